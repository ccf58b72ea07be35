"""Grafts: modules that a method puts in a stage's place in a backbone.

This file is the contract; every other module here is one graft, found by its file name, with
`build(inner, **options)`. A graft of one's own needs no file here: any nn.Module will do.

    forward(x) -> Tensor
        From the stage's input to an output of the stage's shape, type and memory format.

Shapes: N = B * T frames, clip by clip and in order, T to a clip. Tokens [N, L, C] with P class and
register tokens first (option `prefix`), maps [N, C, H, W], channels_last on ResNets.

A graft mostly holds the frozen module it stands for, as `inner`. It shares that module's
parameters, copies none, and changes nothing in it: the backbone it came from computes what it did
before. A frozen inner stays in eval mode when the graft is put in train mode, so that its batch
norms neither move nor look at the batch. To train an inner, give a copy of it with gradients on.

Each has a documented state in which it is the identity, bit for bit the frozen stage: adapter and
hf_gate as they are built, temporal_shift with fold=0, class_regularization with strength=0.
Parameters are float32 whatever the precision of the backbone. The inner runs in the activations'
type, the graft's own arithmetic in its parameters' type, and the result is rounded to what the
inner gave. What is drawn is drawn from the option `seed`, never from the global generators. What a
clip gives does not follow its neighbours or its place in a batch of a given size, to the bit.
Gradients reach the graft's own parameters. Grafts can be copied and pickled.

What decides the output enters the column's key: `code`, the public attributes that are JSON
(options are kept as such), submodules, the bytes of parameters and buffers. A graft may say of
itself, in attributes:

    code: str
        Name and version of what its class computes ("adapter/1"), changed when the code's values
        change. It holds for the class that defines it and no subclass. A class without is
        identified by its source.
    token_wise: bool
        Each output token depends on the token in its place alone (with `frames`, on those in its
        place in the clip's frames), so that the class token may be computed without the others.
        Counts only where the stage it replaces is token-wise too.
        Left out: False; a graft around another module is it only if that module says so.
    frames: int
        T, where frames of a clip look at each other: N is then whole clips, and the frame set is
        part of what the output depends on. Left out, or 0: each frame for itself.
"""
