"""Lightning's BaseFinetuning opens blocks at a later epoch, and adds their parameters to the optimizer then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests import toy

lightning = pytest.importorskip("lightning.pytorch")


def rows() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randn(2, toy.WIDTH, generator=generator, dtype=torch.float64).unbind()) for _ in range(4 * toy.ROWS)
    ]


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = toy.Toy()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.net(*batch).loss / toy.ROWS

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.compatibility("Client trainers", "Lightning's BaseFinetuning (blocks opened at a later epoch)", "works")
@pytest.mark.filterwarnings("ignore")
def test_blocks_that_basefinetuning_opens_are_tracked(tmp_path):
    from lightning.pytorch.callbacks import BaseFinetuning

    from grades_hf import GradESLightningCallback

    class Open(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net.model.layers[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net.model.layers[0], optimizer)

    callback = GradESLightningCallback(tau={"q": 1e9, ".*": 1e-30}, alpha=0.5)
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", callbacks=[Open(), callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(rows(), batch_size=toy.ROWS))
    engine = callback.engine
    assert engine.t == 20
    assert len(engine.components) == 8
    assert engine.frozen == {"net.model.layers.1.self_attn.q_proj": 11, "net.model.layers.0.self_attn.q_proj": 11}
    assert all(p.requires_grad for p in module.parameters())
