"""A small character-level model for a CPU, of the size that nanoGPT.jax documents."""

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 500
eval_iters = 100  # all of val.bin: 97 batches of 12

n_layer = 4
n_head = 4
n_embd = 192
block_size = 96
dropout = 0.1

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 5000

learning_rate = 1e-3
beta2 = 0.99  # an iteration has few tokens: average over more iterations
warmup_iters = 100
lr_decay_iters = 5000
min_lr = 1e-4

dtype = "float32"
