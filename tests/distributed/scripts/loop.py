"""A hand-written Accelerate loop with two drops; the same losses in one process and in two.

python loop.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import tiny_model, tiny_texts

from trimllm_hf import drop_prepared_layers

# split_batches: a batch is cut among the processes, and the scheduler steps once an optimizer step, as in one process
accelerator = Accelerator(
    cpu=True, gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(split_batches=True)
)
model = tiny_model().train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
loader = DataLoader(tiny_texts(), batch_size=4)
prepared = accelerator.prepare(model, optimizer, loader, scheduler)
model, optimizer, loader, scheduler = prepared
losses, rates, step = [], [], 0
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    losses.append(accelerator.reduce(loss.detach(), "mean").item())
    if accelerator.sync_gradients:
        step += 1
        rates.append(scheduler.get_last_lr()[0])
        if step in (3, 6):
            layer_map = drop_prepared_layers(accelerator, model, optimizer, [1], step=step)
weights = [parameter.double().sum().item() for parameter in accelerator.unwrap_model(model).parameters()]
result = {
    "type": accelerator.distributed_type.value,
    "kept": layer_map.kept_layers,
    "steps": [record.step for record in layer_map.history],
    "losses": losses,
    "rates": rates,
    "weights": weights,
}
(Path(sys.argv[1]) / f"rank{accelerator.process_index}.json").write_text(json.dumps(result))
