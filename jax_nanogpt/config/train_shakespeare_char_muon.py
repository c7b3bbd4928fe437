"""The model and tokens of train_shakespeare_char.py, with Muon and each window once per epoch: a lower loss."""

out_dir = "out-shakespeare-char-muon"
dataset = "shakespeare_char"
eval_interval = 500
eval_iters = 100  # all of val.bin: 97 batches of 12

n_layer = 4
n_head = 4
n_embd = 192
block_size = 96
dropout = 0.05

batch_size = 12
gradient_accumulation_steps = 1
draw = "epochs"
max_iters = 5000

optimizer = "muon"
muon_lr = 0.02
muon_weight_decay = 0.1
learning_rate = 3e-3
beta2 = 0.99  # an iteration has few tokens: average over more iterations
schedule = "linear"
warmup_iters = 100
lr_decay_iters = 5000
min_lr = 0.0

dtype = "float32"
