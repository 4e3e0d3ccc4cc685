"""The metrics of numerical health, alone, in a Trainer and over ranks."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection

from lightning_nanguard.metrics import GradientNorm, NonFiniteCount, NonFiniteRate
from tests.distributed.conftest import Launch, launched  # noqa: F401
from tests.distributed.data import NORMS

NAN, INF = math.nan, math.inf
LARGEST = torch.finfo(torch.float32).max


def parameters(*grads: Tensor | None) -> list[nn.Parameter]:
    """Parameters that have these gradients."""
    made = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(2 if grad is None else grad.shape, dtype=getattr(grad, "dtype", None)))
        parameter.grad = grad
        made.append(parameter)
    return made


def norm_of(*grads: Tensor | None) -> float:
    metric = GradientNorm("last")
    metric.update(parameters(*grads))
    return float(metric.compute())


def reduced(norms: list[float]) -> dict[str, float]:
    """What the three reductions give, computed by NumPy."""
    finite = np.array([norm for norm in norms if math.isfinite(norm)])
    if not len(finite):
        return {"mean": NAN, "max": NAN, "last": NAN}
    return {"mean": finite.mean(), "max": finite.max(), "last": finite[-1]}


class TestNonFinite:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_finds_one_bad_element_of_many(self, dtype: torch.dtype, bad: float) -> None:
        """One element among a thousand is enough, in every floating type, and the largest finite one is no fault."""
        for fine in (0.0, 1.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny):
            values = torch.full((1000,), fine, dtype=dtype)
            count = NonFiniteCount()
            count.update(values)
            assert count.compute() == 0, fine
            values[617] = bad
            count.update(values)
            assert count.compute() == 1, fine

    def test_imaginary_part_counts(self) -> None:
        """A complex number is finite when both its parts are, even if its magnitude overflows; a conjugate view too."""
        count = NonFiniteCount()
        count.update(torch.complex(torch.tensor(3e38), torch.tensor(3e38)).conj())
        assert count.compute() == 0
        count.update(torch.complex(torch.tensor(1.0), torch.tensor(NAN)))
        assert count.compute() == 1

    def test_rate_is_the_share_of_updates(self) -> None:
        """An update counts once, however many of its elements and tensors are bad."""
        rng = np.random.default_rng(0)
        rate, count = NonFiniteRate(), NonFiniteCount()
        bad = []
        for _ in range(50):
            values = [rng.normal(size=shape) for shape in ((), (3,), (2, 4))]
            for value in values:
                value[rng.random(value.shape) < 0.05] = rng.choice([NAN, INF, -INF])
            bad.append(not all(np.isfinite(value).all() for value in values))
            tensors = [torch.as_tensor(value) for value in values]
            rate.update(tensors)
            count.update(tensor for tensor in tensors)
        assert 0 < sum(bad) < 50
        assert rate.compute() == pytest.approx(np.mean(bad))
        assert count.compute() == sum(bad)

    @pytest.mark.parametrize(
        ("value", "bad"),
        [
            (1.0, 0),
            (3, 0),
            (NAN, 1),
            (1e300, 0),
            ([], 0),
            ([None, None], 0),
            ([None, torch.tensor(NAN)], 1),
            (torch.zeros(0), 0),
            ([torch.zeros(0, 3), torch.tensor([INF])], 1),
            (torch.tensor([1, 2]), 0),
            ([torch.tensor(True), torch.tensor([2**62])], 0),
            (torch.tensor([[0.0, NAN], [1.0, 0.0]]).to_sparse(), 1),
            (torch.tensor([[0.0, 2.0], [1.0, 0.0]]).to_sparse(), 0),
            (
                torch.sparse_coo_tensor(
                    torch.zeros(1, 0, dtype=torch.long), torch.zeros(0), (3,), check_invariants=False
                ),
                0,
            ),
            (torch.tensor([1.0, NAN], requires_grad=True) * 2, 1),
        ],
    )
    def test_odd_values(self, value: Any, bad: int) -> None:
        """Numbers, integers, empty, missing and sparse tensors are taken as they are; each is one update."""
        rate, count = NonFiniteRate(), NonFiniteCount()
        rate.update(value)
        count.update(value)
        assert (rate.compute(), count.compute(), int(rate.counts[1])) == (bad, bad, 1)

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
    def test_compressed_sparse(self) -> None:
        """Compressed layouts are looked into as well."""
        count = NonFiniteCount()
        count.update(torch.tensor([[0.0, NAN], [1.0, 0.0]]).to_sparse_csr())
        assert count.compute() == 1

    @pytest.mark.parametrize("metric", [NonFiniteRate, NonFiniteCount])
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (None, "to be a tensor, or a list of tensors, but got NoneType"),
            ("loss", "but got str"),
            ([1.0], "to hold tensors, but got float"),
            ({"loss": torch.tensor(1.0)}, r"but got str in it\. Of a dictionary pass the values\(\)"),
        ],
    )
    def test_wrong_values(self, metric: type[NonFiniteRate | NonFiniteCount], value: Any, message: str) -> None:
        """What is no tensor is named by its type."""
        with pytest.raises(TypeError, match=message):
            metric().update(value)

    @pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before:UserWarning")
    def test_nothing_seen(self) -> None:
        """Without an update nothing was non-finite."""
        assert NonFiniteRate().compute() == 0
        assert NonFiniteCount().compute() == 0


class TestGradientNorm:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_equals_torch(self, dtype: torch.dtype) -> None:
        """The norm is that of clip_grad_norm_ on the same numbers in double precision."""
        grads = [torch.randn(shape).to(dtype) for shape in ((3, 4), (5,), (), (2, 3, 2))]
        expected = nn.utils.clip_grad_norm_(parameters(*(grad.clone().double() for grad in grads)), 1.0)
        assert norm_of(*grads) == pytest.approx(float(expected), rel=1e-6)

    @pytest.mark.parametrize(
        ("grad", "norm"),
        [
            (torch.full((100,), 1e30), 1e31),
            (torch.full((100,), 1e-30), 1e-29),
            (torch.full((4,), 60000.0, dtype=torch.float16), 119968.0),
            (torch.full((100,), LARGEST), LARGEST),
            (torch.full((4,), 1e300, dtype=torch.float64), LARGEST),
            (torch.full((4,), 1e-200, dtype=torch.float64), 0.0),
            (torch.full((4,), 1e20, dtype=torch.float64), 2e20),
            (torch.full((4,), 1e-42), 2e-42),
            (torch.zeros(3), 0.0),
            (torch.zeros(3, dtype=torch.float64), 0.0),
        ],
    )
    def test_squares_do_not_overflow(self, grad: Tensor, norm: float) -> None:
        """Finite elements have a finite norm, at most the largest float32; small ones do not vanish."""
        assert norm_of(grad) == pytest.approx(norm, rel=1e-3, abs=1e-45)
        assert norm_of(grad, torch.zeros(2), grad.clone()) == pytest.approx(min(norm * math.sqrt(2), LARGEST), rel=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("bad", [NAN, INF, -INF])
    def test_non_finite_norms_are_counted_apart(self, dtype: torch.dtype, bad: float) -> None:
        """A bad gradient is neither averaged, nor the largest, nor the last."""
        for reduction, expected in reduced([3.0, 1.0]).items():
            metric = GradientNorm(reduction)  # type: ignore[arg-type]
            for value in (3.0, bad, 1.0, bad):
                metric.update(parameters(torch.tensor([value, 0.0], dtype=dtype), torch.zeros(1)))
            assert metric.compute() == expected
            assert metric.non_finite == 2

    @pytest.mark.parametrize("as_tensor", [float, torch.tensor, lambda norm: torch.tensor([norm], dtype=torch.float64)])
    def test_reductions_equal_numpy(self, as_tensor: Callable[[float], Any]) -> None:
        """Mean, largest and last of many norms given as numbers or tensors."""
        rng = np.random.default_rng(1)
        norms = [float(norm) for norm in rng.lognormal(sigma=3, size=200)]
        for index in rng.choice(200, 20):
            norms[index] = float(rng.choice([NAN, INF]))
        for reduction, expected in reduced(norms).items():
            metric = GradientNorm(reduction)  # type: ignore[arg-type]
            for norm in norms:
                metric.update(as_tensor(norm))
            assert metric.compute() == pytest.approx(expected, rel=1e-5)
            assert metric.non_finite == sum(not math.isfinite(norm) for norm in norms)

    def test_huge_norms_have_a_finite_mean(self) -> None:
        """The mean of norms whose sum overflows is still between them."""
        metric = GradientNorm()
        for norm in (LARGEST, LARGEST, torch.tensor(1e300, dtype=torch.float64), 1e300, LARGEST):
            metric.update(norm)
        assert metric.compute() == pytest.approx(LARGEST, rel=1e-6)
        assert metric.non_finite == 0

    def test_long_run_keeps_its_precision(self) -> None:
        """Five thousand updates do not wear the mean away."""
        metric = GradientNorm()
        norm = torch.tensor(0.1)
        for _ in range(5_000):
            metric.update(norm)
        assert metric.compute() == pytest.approx(0.1, rel=1e-4)

    def test_sparse_duplicates_stand_for_their_sum(self) -> None:
        """The gradient of a sparse embedding has the norm of its dense twin."""
        embedding = nn.Embedding(10, 3, sparse=True)
        index = torch.tensor([1, 1, 4])
        embedding(index).sum().backward()
        metric = GradientNorm()
        metric.update(embedding.parameters())
        assert metric.compute() == pytest.approx(math.sqrt(3 * 4 + 3))

    def test_complex_gradient(self) -> None:
        """The norm of a complex gradient is that of its parts."""
        assert norm_of(torch.tensor([3 + 4j, 12j])) == pytest.approx(13.0)

    @pytest.mark.parametrize("grads", [[], [None], [None, torch.zeros(0)]])
    def test_without_a_gradient_nothing_is_taken(self, grads: list[Tensor | None]) -> None:
        """An update in which no parameter has a gradient does not pull the mean down, and alone gives NaN."""
        assert math.isnan(norm_of(*grads))
        metric = GradientNorm()
        metric.update(2.0)
        metric.update(parameters(*grads))
        assert metric.compute() == 2.0

    def test_some_gradients_missing(self) -> None:
        """Frozen parameters and those without a gradient are passed over."""
        assert norm_of(None, torch.tensor([3.0]), None, torch.tensor([4.0])) == 5.0
        frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        metric = GradientNorm()
        metric.update([frozen, *parameters(torch.tensor([3.0]))])
        assert metric.compute() == 3.0

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (torch.ones(3), ValueError, r"shape \(3,\)\. For a single parameter pass \[parameter\]"),
            ([torch.ones(3)], ValueError, r"shape \(3,\) that cannot have a gradient\. Pass the parameters"),
            ([torch.ones(3, requires_grad=True) * 2], ValueError, "cannot have a gradient"),
            (nn.Linear(2, 2), TypeError, r"the norm, or module\.parameters\(\), but got Linear"),
            (nn.Sequential(nn.Linear(2, 2)), TypeError, "to hold tensors, but got Linear"),
            ("norm", TypeError, "but got str"),
            (None, TypeError, "but got NoneType"),
        ],
    )
    def test_wrong_values(self, value: Any, error: type[Exception], message: str) -> None:
        """Gradients, modules and single parameters are refused with what to pass instead."""
        with pytest.raises(error, match=message):
            GradientNorm().update(value)

    def test_sharded_norm_is_made_whole(self) -> None:
        """A DTensor, which clip_grad_norm_ returns for sharded parameters, is taken as the norm of all shards."""

        class Sharded(Tensor):
            def full_tensor(self) -> Tensor:
                return torch.tensor(5.0)

        metric = GradientNorm()
        metric.update(torch.tensor(3.0).as_subclass(Sharded))
        assert metric.compute() == 5.0

    def test_wrong_reduction(self) -> None:
        """A wrong argument is named with its value and what is allowed."""
        wrong: Any = "median"
        with pytest.raises(ValueError, match=r"GradientNorm\(reduction='median'\): expected one of \('mean', 'max'"):
            GradientNorm(wrong)


def each_metric() -> list[Metric]:
    return [NonFiniteRate(), NonFiniteCount(), *(GradientNorm(how) for how in ("mean", "max", "last"))]


class TestEvery:
    @pytest.mark.parametrize("metric", each_metric(), ids=repr)
    def test_forward_gives_the_batch_and_keeps_the_whole(self, metric: Metric) -> None:
        """Called like a function it gives the value of this update alone, and goes on accumulating."""
        whole = metric.clone()
        for value in (2.0, NAN, 4.0, INF, 1.0, NAN):
            alone = metric.clone()
            alone.reset()
            alone.update(torch.tensor(value))
            whole.update(torch.tensor(value))
            assert torch.equal(metric(torch.tensor(value)).nan_to_num(-1), alone.compute().nan_to_num(-1))
        assert metric.compute() == pytest.approx(float(whole.compute()))
        metric.reset()
        metric.update(torch.tensor(5.0))
        assert torch.equal(metric.compute(), alone.clone()(torch.tensor(5.0)))

    @pytest.mark.parametrize("metric", each_metric(), ids=repr)
    def test_merges_with_another(self, metric: Metric) -> None:
        """States of two halves merge into that of the whole, as they do over ranks."""
        first, second, whole = metric.clone(), metric.clone(), metric.clone()
        for value in (2.0, NAN, 4.0):
            first.update(torch.tensor(value))
            whole.update(torch.tensor(value))
        for value in (INF, 7.0, 1.0, NAN):
            second.update(torch.tensor(value))
            whole.update(torch.tensor(value))
        # merge_state puts what comes in before what is there.
        second.merge_state(first)
        assert second.compute() == pytest.approx(float(whole.compute()))

    @pytest.mark.parametrize("metric", each_metric(), ids=repr)
    def test_survives_pickling_and_half_precision_modules(self, metric: Metric) -> None:
        """It can be sent to another process, and a module turned to half precision leaves its states alone."""
        module = nn.Module()
        module.metric = pickle.loads(pickle.dumps(metric))
        module.half()
        module.to(torch.bfloat16)
        for _ in range(3000):
            module.metric.update(1.0)
        module.metric.update(torch.tensor(1.0, dtype=torch.float16))
        expected = metric.clone()
        expected.update(1.0)
        assert module.metric.compute() == expected.compute()

    def test_made_under_a_half_default_type(self) -> None:
        """Made inside a half-precision module, a state still counts beyond 2,048."""
        torch.set_default_dtype(torch.float16)
        try:
            metric = GradientNorm()
        finally:
            torch.set_default_dtype(torch.float32)
        assert metric.finite.dtype == torch.float32

    def test_update_reads_nothing_on_the_host(self) -> None:
        """No update, and no value of a step, makes the host wait for the device."""

        class Reads(TorchDispatchMode):
            names: list[str] = []  # noqa: RUF012

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.names.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        grads = parameters(torch.randn(3, 3), None, torch.randn(4).double(), torch.randn(2).half())
        norm = torch.tensor(2.0)
        with Reads() as mode:
            for metric in each_metric():
                metric(grads if isinstance(metric, GradientNorm) else [parameter.grad for parameter in grads])
                metric(norm)
                metric.update(3.0)
        assert len(mode.names) > 50
        assert not {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"} & set(mode.names)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_update_does_not_synchronise_a_gpu(self) -> None:
        """CUDA itself reports no wait for the device."""
        grads = parameters(torch.randn(3, 3), None, torch.randn(4).double(), torch.randn(2).half())
        for parameter in grads:
            parameter.data = parameter.data.cuda()
            parameter.grad = None if parameter.grad is None else parameter.grad.cuda()
        norm = torch.tensor(2.0, device="cuda")
        metrics = [metric.cuda() for metric in each_metric()]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for metric in metrics:
                metric(grads if isinstance(metric, GradientNorm) else [parameter.grad for parameter in grads])
                metric(norm)
                metric.update(3.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert metrics[0].compute() == 0

    def test_states_are_replaced_and_not_changed(self) -> None:
        """Whoever holds a state, as the guard does before a batch, still has the old value after an update."""
        for metric in each_metric():
            metric.update(2.0)
            before = {name: getattr(metric, name) for name in metric._defaults}
            copies = {name: value.clone() for name, value in before.items()}
            metric.update(torch.tensor(NAN))
            metric(torch.tensor(5.0))
            assert all(torch.equal(before[name], copies[name]) for name in before)
            assert metric.keep_when_skipped

    def test_collection(self) -> None:
        """The three reductions share their states in a MetricCollection."""
        collection = MetricCollection({how: GradientNorm(how) for how in ("mean", "max", "last")})
        for norm in (1.0, 4.0, NAN, 2.5):
            collection.update(norm)
        assert {name: float(value) for name, value in collection.compute().items()} == {
            "mean": 2.5,
            "max": 4.0,
            "last": 2.5,
        }
        assert len(collection.compute_groups) == 1

    @pytest.mark.parametrize("metric", [NonFiniteRate, GradientNorm])
    def test_used_up_generator_is_refused(self, metric: Callable[[], Metric]) -> None:
        """The second metric of a collection does not take a generator that the first one emptied for no gradients."""
        collection = MetricCollection({"a": metric(), "b": metric()})
        with pytest.raises(ValueError, match=r"used up before\. Pass a list, such as list\(module\.parameters"):
            collection.update(parameter for parameter in parameters(torch.ones(2)))
        # A fresh generator without an element is an update without a gradient.
        metric().update(parameter for parameter in ())


def test_ranks_agree(launched: Launch) -> None:  # noqa: F811
    """Two gloo processes with different data compute the same: that of all their updates, in the order of ranks."""
    first, second = (result["metrics"] for result in launched("fork", 2, "plain"))
    assert first == second
    every = NORMS[0] + NORMS[1]
    bad = sum(not math.isfinite(value) for value in every)
    expected = {"rate": bad / len(every), "count": bad, "one_rank": 7.0, **reduced(every)}
    assert first == pytest.approx(expected)


def test_self_log_in_a_trainer(tmp_path: Path) -> None:
    """Logged through self.log, each step shows its own value and the epoch that of all its updates."""
    pl = pytest.importorskip("pytorch_lightning")

    class Recorder(pl.Callback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.steps: list[float] = []
            self.norms: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.steps.append(float(trainer.callback_metrics["norm_step"]))

    recorder = Recorder()

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)
            self.rate = NonFiniteRate()
            self.norm = GradientNorm("mean")
            self.norms = MetricCollection({"max": GradientNorm("max"), "last": GradientNorm("last")})

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.net(batch[0]).square().mean()
            if batch_idx == 3:
                loss = loss * NAN
            self.rate(loss)
            self.log("rate", self.rate, on_step=False, on_epoch=True)
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            recorder.norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
            self.norm(self.parameters())
            self.log("norm", self.norm, on_step=True, on_epoch=True)
            self.norms(list(self.parameters()))
            self.log_dict(self.norms, on_step=False, on_epoch=True)
            if not math.isfinite(recorder.norms[-1]):
                for parameter in self.parameters():
                    parameter.grad = None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4))
    assert len(recorder.norms) == 12
    assert [math.isfinite(norm) for norm in recorder.norms].count(False) == 2
    assert recorder.steps == pytest.approx(
        [norm if math.isfinite(norm) else NAN for norm in recorder.norms], nan_ok=True
    )
    # Lightning resets a logged metric at the end of the epoch.
    expected = reduced(recorder.norms[6:])
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["norm_epoch"] == pytest.approx(expected["mean"])
    assert logged["max"] == pytest.approx(expected["max"])
    assert logged["last"] == pytest.approx(expected["last"])
    assert logged["rate"] == pytest.approx(1 / 6)
