"""Two ways to serve a model, compared by their answers and by their distributions: `vllm-mxfp4 eval`."""
