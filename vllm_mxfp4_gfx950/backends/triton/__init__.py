"""OpenAI's triton_kernels, in two generations, and kernels of our own: one file for each."""
