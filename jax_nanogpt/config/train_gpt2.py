"""GPT-2 124M on OpenWebText: about half a million tokens per iteration, like nanoGPT's run on eight A100s."""

out_dir = "out-gpt2"
dataset = "openwebtext"
eval_interval = 1000
eval_iters = 200

batch_size = 32  # on one GPU of 80 GB; several share it
gradient_accumulation_steps = 15
block_size = 1024
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 0.1

dtype = "bfloat16"
iters_per_call = 2  # about a second each on a large GPU: a run must notice SIGTERM in time
