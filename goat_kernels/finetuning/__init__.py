"""All that ``goat-kernels finetune`` does.

options, recipes    the options of a run and their defaults
methods             the methods: LoRA, GOAT, full fine-tuning, ...
tasks               the tasks: data, a base model and a metric; data and images read the data
models              the base model, a method's adapter on it, saving and loading back; pretraining makes small ones
train               one training run
run                 every method of a run in turn, and the report; output guards the folder
results             one row per method: the table, results.json, results.png
"""
