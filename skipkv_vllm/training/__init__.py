"""Train the gates of `trimkv` for a model (TRIM-KV, arXiv 2512.03324): `skipkv train-gates`.

`student` adds gates to a frozen model, `attention` computes attention with fading keys, `losses` defines the objective,
`loop` trains and measures the gates, and `command` is the command line.
"""
