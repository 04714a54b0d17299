"""OpenAI's triton_kernels, in three generations, and kernels of our own: one file for each."""
