"""The released FlashVSR's formulas (BasicVSR's and IconVSR's too) again: plain, slow, in any float dtype,
and sharing no code with flashvsr or eval.

Written from the page that describes the golden tensors (and, for the v1 projector, from the design's words),
so that an agreement of the two means something. Weights are plain dicts of tensors under the release's names;
every function computes in the dtype it is given, float64 included. Keys and values are lists of chunks that
are concatenated, masks are token by token, the VAE uses 3-D convolutions, memories are dicts.

`python -m tests.oracle OUT --kind ...` writes files of the golden form, of sizes of one's choice.
"""
