"""Train the gates of `trimkv` for a model (TRIM-KV, arXiv 2512.03324): `skipkv train-gates`.

`student` puts gates into a frozen model, `attention` lets its keys fade, `losses` says what the gates are to reach,
`loop` trains and measures them, and `command` is the command line.
"""
