"""gpt2-nano, the small GPT-2 of checkpoints/: 33 minutes on two CPU cores. Data: data/nano/prepare.py."""

out_dir = "out-nano"
dataset = "nano"
eval_interval = 200
eval_iters = 20  # all of val.bin

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
bias = True  # like GPT-2
dropout = 0.15

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 2400

optimizer = "muon"
muon_lr = 0.02
muon_weight_decay = 0.1
learning_rate = 3e-3
beta2 = 0.99
schedule = "linear"
warmup_iters = 100
lr_decay_iters = 2400
min_lr = 0.0

dtype = "float32"
