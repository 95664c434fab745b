"""GoatLinear in a plain training loop: adapt one layer of a pretrained network to a new task.

    python goat_linear_loop.py        a few seconds on a CPU

It writes goat-output.pt into the current folder.
"""

import torch
from torch import nn

from goat_kernels import GoatLinear

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# 1. A "pretrained" network. Take your own here.
network = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)).to(device)

# 2. Freeze it, and put an adapter into the middle layer: eight LoRA experts that share the rank r, of which a router
#    picks two for each token. The layer's own weight stays frozen; lora_A, lora_B and router train.
network.requires_grad_(False)
network[2] = GoatLinear.from_linear(network[2], r=16, num_experts=8, top_k=2, balance_coefficient=1e-2)

trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
total = sum(parameter.numel() for parameter in network.parameters())
print(f"training {sum(parameter.numel() for parameter in trained):,} of {total:,} parameters")

# 3. New data: four clusters, each with its own label.
centres = 0.7 * torch.randn(4, 32, device=device)
labels = torch.randint(4, (2048,), device=device)
inputs = centres[labels] + torch.randn(2048, 32, device=device)

# 4. An ordinary loop. The balance loss, which keeps every expert in use, is added in backward by the layer itself: the
#    loss that you compute stays the task's. Where you divide the loss (gradient accumulation), see docs/training.md.
optimizer = torch.optim.AdamW(trained, lr=3e-3)
first_loss = None
for step in range(100):
    batch = torch.randint(2048, (128,), device=device)
    loss = nn.functional.cross_entropy(network(inputs[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    first_loss = first_loss or loss.item()
    if step % 20 == 19:
        load = ", ".join(f"{share:.2f}" for share in network[2].expert_load.tolist())
        print(f"step {step + 1:3d}: loss {loss.item():.3f}, share of the tokens per expert: {load}")
print(f"the loss went from {first_loss:.3f} to {loss.item():.3f}")

# 5. Save and load as with any module: the state dict holds the frozen weight and the adapter.
torch.save(network.state_dict(), "goat-output.pt")
network.load_state_dict(torch.load("goat-output.pt"))

# 6. The pretrained network is still there, bit for bit.
network.eval()
with torch.no_grad(), network[2].disable_adapter():
    print(f"without the adapter: {nn.functional.cross_entropy(network(inputs), labels).item():.3f}")
