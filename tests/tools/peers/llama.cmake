# llama-cpp-python builds llama.cpp's library for its tools, half of the work: this variable hides its setting
set(LLAMA_BUILD_COMMON OFF)
