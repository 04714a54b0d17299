"""The commands of `vllm-mxfp4`, a file each."""
