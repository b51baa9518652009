"""Triton kernels of the routed-LoRA operator, for GPUs: what ``moelora.ops.cuda`` puts together.

    shrink.py   x to rank space, and router scores from the same read; also back from y in the backward pass
    mix.py      gates in rank space, forward and backward
    cores.py    the same for routed cores
    expand.py   rank space to y, added to what is there; also to the gradient of x
    outer.py    gradients of factors over ragged segments
    sort.py     tokens by the unit they chose
    gather.py   a few tokens, each with the factors of its own units
    launch.py   how a kernel is started
    table.py    block sizes

Products come in two kinds. Whole: row m is token m, and all ranks are one unit. Sorted: rows are the pairs of a token
and a chosen unit; tiles of ``sort.Segments`` hold pairs of one unit. Rank-space tensors keep the order of pairs
(token * k + slot) in both, so that only products know of the sorting. Sums are float32, addresses 64 bits wide,
nothing is added atomically, and no result depends on timing.
"""
