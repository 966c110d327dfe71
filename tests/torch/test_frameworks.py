"""Frameworks that take an optimizer's class: fastai, Lightning and Stable-Baselines3 end as with PyTorch's own."""

import pytest
from helpers import JIT, need_torch

torch = need_torch()
pytestmark = [pytest.mark.torch, pytest.mark.skipif(not JIT, reason="a whole training takes the interpreter minutes")]

from torch_pairs import assert_near  # noqa: E402 - all need torch

from fastrms.torch import RMSprop  # noqa: E402

BOTH = (RMSprop, torch.optim.RMSprop)


def explain_all(optimizer):
    lines = optimizer.explain()
    assert all("the compiled pass" in line for line in lines), lines


@pytest.mark.frameworks("lightning")
@pytest.mark.filterwarnings("ignore")  # Lightning warns of few workers, of few batches and of what it imports
def test_lightning_trains_saves_and_continues(tmp_path):
    import lightning

    # Otherwise Lightning looks for MPI, and starts it in this process where mpi4py is installed.
    from lightning.pytorch.plugins.environments import LightningEnvironment

    class Model(lightning.LightningModule):
        def __init__(self, kind):
            super().__init__()
            torch.manual_seed(0)
            self.kind = kind
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()

        def training_step(self, batch, _):
            x, y = batch
            return ((self.net(x) - y) ** 2).mean()

        def configure_optimizers(self):
            optimizer = self.kind(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    x = torch.linspace(-1, 1, 160, dtype=torch.float64).reshape(40, 4)
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)

    def trainer(epochs):
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=0.5,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            plugins=[LightningEnvironment()],
        )  # fmt: skip

    models = []
    for kind in BOTH:
        first = trainer(2)
        first.fit(Model(kind), batches)
        first.save_checkpoint(tmp_path / "saved.ckpt")
        models.append(Model(kind))
        second = trainer(4)
        second.fit(models[-1], batches, ckpt_path=tmp_path / "saved.ckpt")
        assert second.global_step == 20
        if kind is RMSprop:
            explain_all(second.optimizers[0])
    assert_near(*[list(model.parameters()) for model in models])


@pytest.mark.frameworks("stable_baselines3")
@pytest.mark.filterwarnings("ignore")  # of what it imports
def test_a2c_of_stable_baselines_trains_saves_and_continues(tmp_path):
    import stable_baselines3 as baselines

    agents = []
    for kind in BOTH:
        options = {"optimizer_class": kind, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
        agent = baselines.A2C("MlpPolicy", "CartPole-v1", policy_kwargs=options, seed=0, device="cpu")
        agent.learn(100)
        agent.save(tmp_path / "agent.zip")
        agents.append(baselines.A2C.load(tmp_path / "agent.zip", env=agent.get_env(), device="cpu"))
        agents[-1].set_random_seed(1)
        agents[-1].learn(50, reset_num_timesteps=False)
        assert type(agents[-1].policy.optimizer) is kind
    explain_all(agents[0].policy.optimizer)
    assert_near(*[list(agent.policy.parameters()) for agent in agents], torch.float32)


@pytest.mark.frameworks("fastai")
@pytest.mark.filterwarnings("ignore")  # fastai warns of what it imports
def test_fastai_trains_with_a_schedule():
    import fastai.callback.progress
    import fastai.callback.schedule  # noqa: F401 - both give Learner its methods
    from fastai.basics import DataLoader, DataLoaders, Learner, OptimWrapper, partial

    x = torch.linspace(-1, 1, 160).reshape(40, 4)
    pairs = list(zip(x, x.sum(1, keepdim=True), strict=True))
    batches = DataLoaders(*(DataLoader(pairs, bs=8, num_workers=0) for _ in range(2)), device="cpu")
    ends = []
    for kind in BOTH:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        loss = torch.nn.functional.mse_loss
        learner = Learner(batches, net, loss_func=loss, opt_func=partial(OptimWrapper, opt=kind))
        with learner.no_bar(), learner.no_logging():
            learner.fit_one_cycle(3, 1e-2)
        if kind is RMSprop:
            explain_all(learner.opt.opt)
            assert learner.opt.opt.param_groups[0]["lr"] < 1e-3  # the end of the cycle
        ends.append(list(net.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
