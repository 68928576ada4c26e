"""What runs in the interpreter that has a tool, which may be another than ours: these files import nothing of this package.

    PYTHON run.py TOOL check JSON                       # JSON: the tool's own settings
    PYTHON run.py TOOL convert FOLDER OUT JSON
    PYTHON run.py TOOL quantize FOLDER CONVERTED OUT JSON
    PYTHON run.py TOOL read OUT PROMPTS RESULT JSON

A tool is a file with three functions: `convert(folder, out, **settings)` calls the format's own converter,
`quantize(folder, converted, out, kind, **settings)` its quantizer, and `load(out, **settings)` gives what answers a prompt
by the format's runtime. One that needs programs which are no packages has `check(kind, **settings)` too, which fails if they
are missing.
"""
