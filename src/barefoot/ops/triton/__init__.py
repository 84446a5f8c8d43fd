"""Products on a GPU, in Triton, from the very bytes that the CPU kernels read.

A weight's buffer moves to the device as it is, in a layout of which 16 rows lie interleaved: rows become the lanes of a
warp, so neighbouring threads read neighbouring bytes, and nothing is repacked or documented twice.

* ``panel_matmul``: activations in float16, bfloat16 or float32 times integer groups of 1 to 8 bits (W4A16, W2A16 and
  their kin), from the layout of ``barefoot.ops.panels``;
* ``plane_matmul``: activations of 1 to 8 bits times weights of 1 to 8 bits, from the layout of ``barefoot.ops.planes``;
* ``cross_entropy``: the loss of next tokens and its gradients, without their logits;
* ``flash``: attention that trains, forward and backward, as ``barefoot.ops.flash`` describes it.

All need torch and Triton (the extra ``gpu``) and tensors on a CUDA device. With ``TRITON_INTERPRET=1`` they run in
Triton's interpreter on tensors of the CPU, which is how they are tested. Modules here import Triton and torch, so
nothing imports them but who holds CUDA tensors already.
"""
