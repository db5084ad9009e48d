"""What other libraries can open: LoRA files and diffusers pipelines."""
