"""The stage of the plan: the one that was given, or that of least loss within the budget; an edited one is kept."""

from collections.abc import Callable, Mapping, Set

from denselab.compress.bit_losses import Measured
from denselab.compress.budgets import Budget, budget_text, limits_activations
from denselab.compress.choose_bits import ChosenBits
from denselab.compress.job import Job
from denselab.compress.methods.all import measuring
from denselab.compress.methods.method import Method
from denselab.compress.observing import Stats
from denselab.compress.plan import MOST_WEIGHT_BITS, QuantPlan, exact_everywhere, wide_weights
from denselab.compress.round_sums import round_sums
from denselab.compress.small_file import small_model
from denselab.compress.stages import decides
from denselab.compress.within_budget import bits_for, float_products
from denselab.compress.work_folder import file_sha256
from denselab.errors import InputError

PLAN = "plan.json"


def given_plan(job: Job) -> QuantPlan:
    """The user's plan, as it is."""
    plan, source = job.given, job.options.plan
    assert plan is not None
    assert source is not None
    _say_of_wide_weights(job, plan)
    path = job.work.folder / PLAN
    if path.exists() and source.resolve() == path.resolve():
        return plan
    return _staged(job, {"given": file_sha256(source)}, lambda: plan)


def chosen_plan(job: Job, stats: Stats, measured: Measured, budget: Budget) -> QuantPlan:
    """The plan of least loss within the budget. Raises InputError for a budget that cannot be met, naming what can."""
    importance, seed = decides(job, budget), job.options.seed
    asked_for = job.options.quantize_attention or limits_activations(budget)
    left_float = frozenset[str]() if asked_for else float_products(job.graph)

    def draft_bytes(chosen: ChosenBits) -> int:
        """Of the file that a choice makes, by quantizers that are fitted in seconds."""
        job.say("looking at the size of a draft")
        method = measuring(job.method)
        quantized = job.quantized(method, stats, _plan_of(job, method, chosen, left_float))
        rounded = round_sums(quantized, job.pixels(1))
        return small_model(job.subject, rounded, job.network_hw, job.traces).ByteSize()

    def make() -> QuantPlan:
        chosen = bits_for(job.graph, measured, budget, importance, seed, draft_bytes)
        return _plan_of(job, job.method, chosen, left_float)

    made_with = {
        "budget": budget_text(budget),
        "method": job.method.name,
        "importance": importance.value,
        "kept": sorted(each.value for each in job.options.kept),
        "most_weight_bits": MOST_WEIGHT_BITS,
        "left_float": sorted(left_float),
        "seed": seed,
        "sensitivity": job.work.sha256("sensitivity.json"),
        "float_network": job.work.sha256("float.onnx"),
    }
    plan = _staged(job, made_with, make)
    if plan.method != job.method.name:
        path = job.work.folder / PLAN
        raise InputError(
            f"{path}: was edited to the method {plan.method}, but --method is {job.method.name}; give --plan {path}"
        )
    _say_of_wide_weights(job, plan)
    return plan


def _staged(job: Job, made_with: Mapping[str, object], make: Callable[[], QuantPlan]) -> QuantPlan:
    return job.work.stage(
        PLAN,
        made_with,
        make,
        QuantPlan.write,
        lambda path: QuantPlan.read(path, job.graph.site_list()),
        may_be_edited=True,
    )


def _say_of_wide_weights(job: Job, plan: QuantPlan) -> None:
    if wide := wide_weights(job.graph, plan):
        job.say(
            f"{len(wide)} weights of 8 bits, such as {wide[0]}: engines multiply them wrongly on processors of x86 "
            f"without VNNI; {MOST_WEIGHT_BITS} bits are exact everywhere"
        )


def _plan_of(job: Job, method: Method, chosen: ChosenBits, left_float: Set[str]) -> QuantPlan:
    planned = {key: width for key, width in chosen.bits.items() if key not in left_float}
    if not planned:
        raise InputError(
            "--budget: wanted something to quantize beside products of two activations, which stay in float, got "
            "nothing; give --quantize-attention"
        )
    planned = exact_everywhere(job.graph, planned)
    return QuantPlan.make(job.graph, method.name, method.spec, planned, job.options.kept)
