"""The arithmetic of qaxis, version 1: five rules, so that bits can be compared.

Floating-point addition is not associative; "equal to the reference" means nothing until the order of operations is
fixed. Nothing else may compute a canonical bit.

* **Rule 1, inputs.** They are widened to float32. A product of two bfloat16 or two float16 numbers is exact there,
  barring over- and underflow.
* **Rule 2, sums.** A sum is a balanced tree over adjacent pairs: pad with +0.0 to a power of two, then add even and odd
  neighbours until one is left. Sums over keys are trees over blocks of a power of two, so that no split of the work
  that respects the blocks can change a bit. Those of what is left out count in 64-bit integers, which have no order
  (``attention/completion.py``).
* **Rule 3, operations.** Additions, products and quotients are single IEEE float32 operations, rounded to nearest and
  never contracted. The exponential is our own 2^t, of separate additions and products, as libraries' differ.
  ``torch.set_flush_denormal(True)`` makes the processor another one, without numbers below 2^-126: it is not undone
  here, as it belongs to the thread that asked for it, and moves nothing but what depends on such numbers.
* **Rule 4, ranking.** The ranking key is the score of the *raw* query as an integer in the order of the scores, -0.0
  being +0.0; a tie goes to the lower position. Normalising first would be another order in floating point.
* **Rule 5, softmax.** It subtracts the highest selected logit, which is known before any exponential: nothing is
  rescaled on the way.

Each language states them once: ``reference.py`` (PyTorch), ``triton.py``, ``canonical.cuh`` (CUDA C++).
``rounding.py`` bounds what they leave to rounding, ``fast_scores.py`` how far quicker scores are from canonical ones.
"""
