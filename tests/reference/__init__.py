"""The oracle: eviction of running requests on Hugging Face transformers, without any code of the package."""
