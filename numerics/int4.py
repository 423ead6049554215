"""INT4 for weights alone: the numeric "int4-weights" of decode steps under ONNX Runtime on a CPU.

A decode step multiplies every weight with one row, so that it takes as long as reading the weights
does: half the bytes of INT8 are read faster. Nothing is calibrated. Weights are symmetric S4 with
one fp32 scale for every output and block of inputs; the last block may be shorter. They are rounded
to the nearest or, with a Gram matrix, by GPTQ (arXiv:2210.17323): see `numerics.int8`.

ONNX Runtime runs `DequantizeLinear` of constant S4 before `MatMul` as one kernel, MatMulNBits,
under default session options and for any number of inputs; it rounds every block of the activations
to S8. One row by 2048 x 8192, on one thread with VNNI: fp32 1.84 ms, dynamic INT8 0.56 ms, INT4
0.43 ms; by 512 x 512 it is no faster than INT8, and with 32 rows it takes twice as long. INT8 for
weights alone, 0.66 ms, is slower than dynamic INT8 there: it is not offered. A decode step of a
Llama of width 2048 with two layers: fp32 14.6 ms, dynamic INT8 4.05 ms, INT4 2.96 ms.
"""

INT4 = "int4-weights"
BLOCK = 32  # inputs that share a scale
LIMIT = 7  # largest weight
