"""GPT-2 124M on OpenWebText: about half a million tokens per iteration, like nanoGPT's run on eight A100s."""

out_dir = "out-gpt2"
dataset = "openwebtext"
eval_interval = 1000
eval_iters = 200

batch_size = 32  # on each GPU of 80 GB
gradient_accumulation_steps = 16  # in all: 8 GPUs take two each
block_size = 1024
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 0.1

dtype = "bfloat16"
iters_per_call = 2  # about a second each on a large GPU: a run must notice SIGTERM in time
