"""Exports for other libraries: LoRA files and diffusers pipelines."""
