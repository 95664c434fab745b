"""PEFT with transformers.Trainer: a GOAT adapter on a language model, trained, saved and loaded again.

    python peft_trainer.py        about ten seconds on a CPU

It writes goat-output-example/ into the current folder. The model is tiny and random, so that the script needs no
network; for yours, replace `base_model()`.
"""

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from goat_kernels import GoatConfig
from goat_kernels.training import GoatCallback, router_report


def base_model() -> PreTrainedModel:  # yours: AutoModelForCausalLM.from_pretrained("NAME", dtype="bfloat16")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


# 1. GoatConfig stands where LoraConfig did. r is the rank of all experts together.
config = GoatConfig(r=16, num_experts=8, top_k=2, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base_model(), config)
model.print_trainable_parameters()

# 2. Data as Trainer wants it: here sequences that count upwards, yours come from a tokenizer.
starts = torch.randint(32, (256, 1))
data = [{"input_ids": row, "labels": row} for row in (starts + torch.arange(16)) % 32]

# 3. Trainer as always. GoatCallback adds the balance loss and the experts' load to the logs.
arguments = TrainingArguments(
    "goat-output-example",
    max_steps=40,
    per_device_train_batch_size=8,
    learning_rate=1e-2,
    logging_steps=10,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(model, arguments, train_dataset=data, callbacks=[GoatCallback()])
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"the loss went from {float(losses[0]):.3f} to {float(losses[-1]):.3f}")
print(router_report(model))  # which experts each layer used; even is best

# 4. Save the adapter alone, and load it onto the base model. A process that loads one has to import goat_kernels.
model.save_pretrained("goat-output-example/adapter")
reloaded = PeftModel.from_pretrained(base_model(), "goat-output-example/adapter").to(model.device)

tokens = data[0]["input_ids"].unsqueeze(0).to(model.device)
with torch.no_grad():
    same = torch.equal(model.eval()(tokens).logits, reloaded.eval()(tokens).logits)
print(f"the reloaded model gives the same outputs: {same}")
