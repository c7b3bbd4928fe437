"""The Shakespeare model on the help texts that come with Python: no download, two minutes on a CPU."""

out_dir = "out-pydoc-char"
dataset = "pydoc_char"
eval_interval = 250
eval_iters = 50

n_layer = 4
n_head = 4
n_embd = 192
block_size = 96
dropout = 0.1

batch_size = 12
gradient_accumulation_steps = 1
max_iters = 1000

learning_rate = 1e-3
beta2 = 0.99
warmup_iters = 100
lr_decay_iters = 1000
min_lr = 1e-4

dtype = "float32"
