"""The packages that each engine needs, and those that are of use beside them."""

# engine, as `trimllm doctor --engine` calls it -> packages beside torch, transformers and accelerate
ENGINES: dict[str, tuple[str, ...]] = {
    "none": (),
    "ddp": (),
    "fsdp2": (),
    "zero1": ("deepspeed",),
    "zero2": ("deepspeed",),
    "zero3": ("deepspeed",),
}
PACKAGES = {
    "transformers": "needed",
    "torch": "needed",
    "accelerate": "needed",
    "deepspeed": "for ZeRO: pip install 'trimllm_hf[deepspeed]'",
    "peft": "for adapters",
    "trl": "for its Trainers",
    "datasets": "for data sets from the Hub",
    "matplotlib": "for pictures: pip install 'trimllm_hf[plot]'",
}
