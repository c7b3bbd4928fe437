// llm.c's training step as a library: train_gpt2.c has its own batches and settings in main().
#define TESTING
#include "train_gpt2.c"

static GPT2 model;
static int iterations;

void load(const char *checkpoint) { gpt2_build_from_checkpoint(&model, checkpoint); }

static void clip(float most) {
    double sum = 0.0;
    for (size_t i = 0; i < model.num_parameters; i++) { sum += model.grads_memory[i] * model.grads_memory[i]; }
    if (sqrt(sum) <= most) { return; }
    float scale = most / sqrt(sum);
    for (size_t i = 0; i < model.num_parameters; i++) { model.grads_memory[i] *= scale; }
}

// the biases of a model that has none stay zero without a gradient
static void drop_bias_gradients() {
    int biases[] = {3, 5, 7, 9, 11, 13, 15};  // in train_gpt2.c's order of the parameters
    float *tensor = model.grads_memory;
    for (int i = 0, next = 0; i < NUM_PARAMETER_TENSORS; tensor += model.param_sizes[i++]) {
        if (i != biases[next]) { continue; }
        memset(tensor, 0, model.param_sizes[i] * sizeof(float));
        next++;
    }
}

float train(int *inputs, int *targets, int B, int T, int bias, const float *settings) {
    gpt2_forward(&model, inputs, targets, B, T);
    float loss = model.mean_loss;
    gpt2_zero_grad(&model);
    gpt2_backward(&model);
    if (!bias) { drop_bias_gradients(); }
    clip(settings[4]);
    gpt2_update(&model, settings[0], settings[1], settings[2], 1e-8f, settings[3], ++iterations);
    return loss;
}
