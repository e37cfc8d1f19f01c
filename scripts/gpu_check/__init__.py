"""The ten-minute check of a bare CUDA machine: `scripts/gpu_check.sh`.

`prepare` gathers what the machine lacks; `attention` carries vLLM's kernel. On the machine `environment` installs it,
`steps` says what is run and how long it may take, `commands` runs it, and `run` writes the results. The other files are
what single steps run: `load`, `sanitized`, `compaction` and `many`.

Everything that runs before the wheels are installed needs the standard library only.
"""
