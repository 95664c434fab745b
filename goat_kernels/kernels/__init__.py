"""The passes in Triton, one file per pass: kernel, launcher and the choice of its form beside one another.

Symbols: T tokens, N in_features, M out_features, E experts, R total rank, D = R / E, R0 columns of the frozen residual
pair, K top_k; BT, BN, BM, BC are a program's blocks of them (C: hidden columns). "compute" is x's dtype. All kernels
accumulate in float32 and write each element once.

    passes.py    the passes as the rest of the package calls them
    replay.py    a repeated call without the host's work
    forward      adapter.py  forward.py       in stages: staged_forward.py  project.py  expand.py
    backward     hidden_gradient.py  weight_gradient.py  expand.py
    shared       common.py  dropout.py        tiles: configs.py (choice)  tiles.py (table)       launch.py
"""
