"""The Triton kernels, one file per pass: no autograd, no modules. ``backends/triton_backend`` decides which run.

Symbols: T tokens, N in_features, M out_features, E experts, R total rank, D = R / E, R0 columns of the frozen residual
pair, K top_k; BT, BN, BM, BC are a program's blocks of them (C: hidden columns). "compute" is x's dtype. All of them
accumulate in float32 and write each element once.

    forward    pack.py  forward.py  balance.py          in stages: project.py  route.py  expand.py
    backward   hidden_gradient.py  weight_gradient.py  expand.py
    shared     routing.py  dropout.py  common.py         around them: configs.py (tiles)  launch.py
"""
