"""Fine-tune GPT-2 on Shakespeare, in its own tokens (data/shakespeare/prepare.py), at a low, constant learning rate."""

init_from = "gpt2"
out_dir = "out-shakespeare"
dataset = "shakespeare"
eval_interval = 5
eval_iters = 40

batch_size = 1
gradient_accumulation_steps = 32  # 32 x 1024 tokens per iteration
max_iters = 20
dropout = 0.1

learning_rate = 3e-5
schedule = "constant"
warmup_iters = 0
iters_per_call = 1

dtype = "float32"
