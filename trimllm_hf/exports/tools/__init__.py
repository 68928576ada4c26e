"""What runs in the interpreter that has a tool, which may be another than ours: these files import nothing of this package.

    PYTHON run.py TOOL convert FOLDER OUT JSON      # JSON: the tool's own settings
    PYTHON run.py TOOL read OUT PROMPTS RESULT JSON

A tool is a file with two functions: `convert(folder, out, **settings)` calls the format's own converter, and
`load(out, **settings)` gives what answers a prompt by the format's runtime.
"""
