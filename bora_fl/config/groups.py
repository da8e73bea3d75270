"""Every setting: a field of its group, with its bounds, its default and what it is for."""

from typing import Annotated, ClassVar, Literal

from pydantic import AliasGenerator, BaseModel, BeforeValidator, ConfigDict, Field

from bora_fl.config.tasks import TASKS, Task, TaskName

Scalar = bool | int | float | str

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class ConfigError(ValueError):
    """A run config that cannot be used; each line of the message names a key, its value and the remedy."""


class Group(BaseModel):
    """Frozen fields, whose names have hyphens in a run config; an unknown one is an error."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=AliasGenerator(alias=lambda name: name.replace("_", "-")),
        populate_by_name=True,
        allow_inf_nan=False,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


class ModelSettings(Group):
    """The frozen base model."""

    name: str = Field("embedded:minilm", description="hub id, local folder, or embedded:minilm | embedded:smollm2")
    revision: str = Field("", description="hub revision; empty is the default branch")
    task: TaskName = Field(
        "classification",
        description="what the model is trained for: a class of each text, any number of them (multi-label), a class of "
        "each word (token-classification), a number for each text (regression), or text (causal-lm)",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the frozen weights")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="bitsandbytes' form of the frozen linear layers; 4bit: NF4 with double quantization"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="how transformers computes attention; auto: its own choice for the model"
    )
    max_length: Count = Field(48, description="tokens an example is cut at")
    pooling: Literal["auto", "cls", "mean", "last", "layers"] = Field(
        "auto",
        description="what the head reads (classification); layers: the mean over the tokens of every layer; auto: "
        "layers for a sentence encoder whose head is solved without privacy, else what the model was trained for",
    )

    @property
    def kind(self) -> Task:
        """What goes with the task."""
        return TASKS[self.task]


class AdapterSettings(Group):
    """What is trained beside the frozen base model."""

    method: str = Field(
        "bora", description="bora, ravan, dense-core, a PEFT method (lora, dora, gralora, lokr, vera, hra, ...) or full"
    )
    rank: Count = Field(8, description="r")
    num_blocks: Count = Field(8, description="b, the number of row blocks and of column blocks (BoRA); heads (RAVAN)")
    alpha: Positive = Field(16.0, description="the update is scaled by alpha / r")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout before A")
    target_modules: str = Field("query,value", description="comma-separated names, a regex, or all-linear")
    modules_to_save: str = Field(
        "", description="comma-separated names of modules that are trained whole and merged beside the adapter"
    )
    sigma_transform: Literal["exp_norm", "identity"] = Field("exp_norm", description="how Sigma is made of sigma")
    train_head: bool = Field(True, description="train the classification head too")

    @property
    def blocks(self) -> int:
        """Blocks of this adapter's factors: b, or 1 for a method without blocks."""
        return self.num_blocks if self.method == "bora" else 1

    @property
    def transform(self) -> Literal["exp_norm", "identity"]:
        """How this adapter's Sigma is made of sigma, for one block too; other methods' Sigma is 1 and stays it."""
        return self.sigma_transform if self.method == "bora" else "identity"

    @property
    def untrained(self) -> frozenset[str]:
        """The parts that this method never trains, whatever a strategy asks for."""
        return frozenset() if self.method == "bora" else frozenset({"sigma"})

    def targets(self) -> str | list[str]:
        """The value in the form that PEFT's `target_modules` takes."""
        text = self.target_modules.strip()
        if text == "all-linear" or any(sign in text for sign in "*^$|()[]\\"):
            return text
        return _names(text)

    def whole_modules(self) -> list[str]:
        """The value in the form that PEFT's `modules_to_save` takes."""
        return _names(self.modules_to_save)


class HeadSettings(Group):
    """The head: solved from sums over all clients' examples, then trained with the adapter."""

    init: Literal["auto", "closed-form", "random"] = Field(
        "auto", description="closed-form: solved before round 1 from sums over all examples; auto: where that can be"
    )
    solve_again: Annotated[str, BeforeValidator(str), Field(pattern=r"^(end|never|[1-9]\d{0,5})$")] = Field(
        "end",
        description="never, end or N: solve it again on the adapted features after the last merge, or after every Nth "
        "and the last, and keep what has the least held-out loss: the trained head, the solved one at some scale of "
        "the logits, or their mean (privacy.mode = none)",
    )
    max_width: Annotated[int, Field(ge=0)] = Field(
        2048,
        description="features that are wider are summed over so many random directions of theirs (k(k+1)/2 numbers a "
        "client); 0: over all, however many",
    )
    budget_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of privacy.epsilon that the sums are released with (privacy.mode = record)"
    )
    number_range: str = Field(
        "", description="low,high: where all numbers lie, known beforehand (regression, privacy.mode = record)"
    )

    def solves_after(self, round: int, *, last: bool) -> bool:
        """Whether ``solve-again`` names this round."""
        every = int(self.solve_again) if self.solve_again.isdigit() else 0
        return self.solve_again != "never" and (last or (every > 0 and round % every == 0))


class DataSettings(Group):
    """The data set, and how it is split over clients."""

    name: str = Field(
        "embedded:sentiment4",
        description="hub id, local .parquet, .jsonl, .json, .csv or .tsv file or folder, or "
        "embedded:sentiment4 | ratings4 | newsgroups20 | docstrings4",
    )
    subset: str = Field("", description="configuration of a hub data set")
    train_split: str = Field("train", description="split (or value of a column named split) that clients train on")
    test_split: str = Field("test", description="split of the server's central test set; empty for none")
    format: Literal["auto", "text", "words", "prompt", "messages", "preference"] = Field(
        "auto",
        description="what a row is: a text, words, a prompt with a response, messages, or a pair of responses, which "
        "is trained by DPO; auto: by the columns",
    )
    text_column: str = Field("text", description="input text or words; the prompt or the messages (instruction data)")
    label_column: str = Field(
        "label", description="class, or number; a list of classes for multi-label, one for each word for words"
    )
    response_column: str = Field(
        "", description="answer (instruction data), or the response that was chosen; the loss covers it alone"
    )
    context_column: str = Field("", description="what a prompt is about, such as input; follows it after a blank line")
    rejected_column: str = Field("", description="the response that was rejected (preference)")
    partition: Literal["iid", "dirichlet", "pathological", "natural", "linear", "square", "exponential", "local"] = (
        Field("natural", description="how examples are dealt to clients; local: every site has data of its own")
    )
    partition_by: str = Field("domain", description="column of the natural id")
    alpha: Positive = Field(0.5, description="concentration of the Dirichlet split; small is skewed")
    classes_per_client: Count = Field(2, description="classes a client holds in the pathological split")
    num_partitions: CountOrZero = Field(0, description="number of clients; 0 is the federation's size")
    evaluation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="each client's held-out part")
    packing: bool = Field(False, description="put several training examples into a row, apart (causal-lm)")
    general_text: str = Field(
        "",
        description="text file, or embedded:python-docs: its loss in every evaluated round says what the model forgets "
        "(causal-lm)",
    )
    max_train_examples: CountOrZero = Field(0, description="seeded subsample of the training split; 0 is all")
    max_test_examples: CountOrZero = Field(0, description="seeded subsample of the central test set; 0 is all")

    @property
    def dialog(self) -> bool:
        """Whether a row is a prompt with a response or two, or messages."""
        return self.format in ("prompt", "messages", "preference") or bool(self.response_column)


class TrainSettings(Group):
    """Local training."""

    local_steps: CountOrZero = Field(15, description="optimizer steps a round; 0 counts local-epochs instead")
    local_epochs: Positive = Field(1.0, description="passes over the client's data a round when local-steps is 0")
    batch_size: Count = Field(16, description="sequences per step and accumulation part")
    length_bucket: Count = Field(
        8, description="batches that are sorted by length together, so that little is padding; 1 is off"
    )
    accumulation: Count = Field(1, description="batches whose gradients make one step")
    optimizer: Literal["adamw", "sgd", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = Field(
        "adamw", description="local optimizer; of bitsandbytes with 8-bit moments, or moments that leave a full GPU"
    )
    optimizer_state: Literal["fresh", "kept"] = Field(
        "fresh", description="whether adamw's moments start anew each round or stay at the client"
    )
    learning_rate: Positive = Field(1.5e-3, description="local learning rate in the first round")
    head_learning_rate: NonNegative = Field(0.0, description="learning rate of the trained head; 0 is learning-rate")
    b_learning_rate_ratio: Positive = Field(1.0, description="LoRA+: learning rate of B over that of A and Sigma")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="learning rate over the run")
    schedule_by: Literal["round", "step"] = Field(
        "round", description="whether the learning rate changes from round to round alone, or with each step"
    )
    warmup_rounds: NonNegative = Field(0.0, description="rounds of linear warm-up; a part of one with schedule-by step")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="momentum of sgd")
    max_grad_norm: NonNegative = Field(
        1.0, description="global gradient clipping; 0 is off; privacy.clip-norm is in its place under record"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="autocast; auto is bf16 where it is fast; fp16 trains with a scaled loss"
    )
    dpo_beta: Positive = Field(
        0.1, description="how closely DPO holds the model to the base model's responses (data.format = preference)"
    )
    label_prior: NonNegative = Field(
        0.0, description="tau of the label-prior loss (classification): takes a client's class shares out of its loss"
    )
    label_prior_floor: Fraction = Field(
        0.1, description="share of all clients' class shares in a client's own, so that a missing class has a gradient"
    )
    distillation: NonNegative = Field(
        0.0, description="FedGKD's beta: holds predictions near the received model's (classification, solved head)"
    )
    not_true_distillation: NonNegative = Field(
        0.0,
        description="FedNTD's beta: holds the odds among the classes that are not an example's own (classification)",
    )
    base_dropout: bool = Field(True, description="dropout in the base model's body, as its config has it")
    checkpointing: bool = Field(False, description="gradient checkpointing")
    compile: bool = Field(
        False, description="train through torch.compile: minutes before the first step, and quicker ones after it"
    )
    prefix_cache_mb: CountOrZero = Field(
        0,
        description="megabytes for what frozen layers below the adapted ones make of the examples, computed once, "
        "without dropout; 0 is off",
    )
    proximal_mu: NonNegative = Field(0.0, description="FedProx: mu/2 |trained - received|^2 is added to the loss")
    evaluation_batch_size: Count = Field(64, description="sequences per evaluation batch")


class StrategySettings(Group):
    """How the server merges."""

    name: str = Field("refactor", description="a row of `bora-fl strategies`, or package.module:attribute")
    fraction_train: Fraction = Field(1.0, description="share of the nodes sampled each round")
    fraction_evaluate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of nodes in a separate evaluation round"
    )
    evaluate_in_train: bool = Field(
        True, description="clients evaluate the received adapter in train replies, as often as run.evaluate-every"
    )
    min_nodes: CountOrZero = Field(
        0, description="nodes to wait for before round 1; 0 is the federation's size if known, else 2"
    )
    min_replies: Count = Field(1, description="usable replies below which a round changes nothing")
    wait_seconds: Positive = Field(600.0, description="how long to wait for min-nodes before the run stops")
    timeout: Positive = Field(3600.0, description="seconds a round waits for replies")
    weighting: Literal["examples", "uniform"] = Field("examples", description="weight of a client")
    memory_mb: Count = Field(
        2048,
        description="megabytes for replies until they are merged, and again for the layers that are merged at once; "
        "replies beyond wait in a temporary file",
    )
    refit: Literal["B", "all"] = Field(
        "B", description="what a refactorization solves for: B alone, or B, A and Sigma in turn (more blocks than one)"
    )
    sweeps: Count = Field(20, description="least-squares sweeps of a refactorization")
    residual: Literal["drop", "carry", "fold"] = Field("drop", description="what becomes of what the rank cannot hold")
    residual_rank: CountOrZero = Field(8, description="rank budget of carry, fold and the product's momentum")
    product_step: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0, description="step from the last product to the mean product; below 1 a moving average, above 1 beyond it"
    )
    product_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Nesterov's momentum of the product, kept at rank residual-rank"
    )
    threshold: Fraction = Field(0.9, description="share of the spectrum's energy kept (florist)")
    sparse_scale: NonNegative = Field(2.0, description="what fedrpca multiplies the clients' sparse part by")
    gram: Literal["blocks", "diagonal"] = Field(
        "blocks", description="Gram matrices of the layers' inputs (regmean): diagonal blocks, or diagonals alone"
    )
    gram_examples: Count = Field(256, description="training examples a client takes its Gram matrices over (regmean)")
    upload_fraction: Fraction = Field(
        0.25, description="share of its update's entries (cellm) or components (lora-a2) sent"
    )
    robust: Literal["none", "median", "trimmed-mean", "krum", "multi-krum", "norm-clip"] = Field(
        "none", description="robust rule on the clients' products"
    )
    byzantine: CountOrZero = Field(1, description="clients assumed bad (krum, trimmed-mean)")
    server_optimizer: Literal["none", "momentum", "adam", "yogi"] = Field(
        "none", description="FedAvgM, FedAdam, FedYogi"
    )
    server_learning_rate: Positive = Field(1.0, description="step of the server optimizer")
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="beta 1")
    server_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.99, description="beta 2 (adam, yogi)")
    server_epsilon: Positive = Field(1e-3, description="tau, the degree of adaptivity (adam, yogi)")
    max_update_norm: NonNegative = Field(0.0, description="an update whose product moved further is rejected; 0 is off")
    max_weight_ratio: NonNegative = Field(
        1000.0, description="a reply that claims this many times the median client's examples is rejected; 0 is off"
    )
    min_cosine: Annotated[float, Field(ge=-1, le=1)] = Field(
        -1.0, description="an update whose cosine with the others' mean is lower is rejected; -1 is off"
    )
    max_loss_increase: NonNegative = Field(
        0.0, description="an update whose model's held-out loss rises by more is rejected; 0 is off"
    )
    screening_examples: Count = Field(256, description="examples of the central test set kept for max-loss-increase")


class WireSettings(Group):
    """What travels."""

    codec: str = Field(
        "float32",
        description="how clients send updates: float32, or stages of topk:SHARE, lowrank:RANK, fp16, bf16, int8, int4 "
        "joined by +",
    )
    feedback: bool = Field(True, description="clients add what the codec lost to their next update")


class PrivacySettings(Group):
    """Differential privacy; see docs/privacy.md."""

    mode: Literal["none", "record", "client", "local"] = Field(
        "none", description="record: DP-SGD; client: noise at the server; local: each update noised before it leaves"
    )
    epsilon: Positive = Field(6.0, description="budget of each client (record, local) or of the run (client)")
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="delta of the budget")
    noise_multiplier: NonNegative = Field(0.0, description="noise / clip-norm; 0 solves it once for the planned steps")
    clip_norm: Positive = Field(1.0, description="clipping norm, per sample (record) or per update (client, local)")
    adaptive_clipping: bool = Field(False, description="adapt clip-norm to a quantile (client)")
    accountant: Literal["prv", "rdp"] = Field("prv", description="accountant of the ledger")
    physical_batch_size: CountOrZero = Field(0, description="sequences in memory at once; 0 is twice the batch size")
    secure_aggregation: bool = Field(False, description="SecAgg+: the server learns the sum of the updates alone")
    secure_threshold: Annotated[float, Field(gt=0.5, le=1)] = Field(
        0.67, description="share of the clients that must answer to the end; the others may vanish (SecAgg+)"
    )
    clipping_range: Positive = Field(8.0, description="largest entry of an update that can be masked (SecAgg+)")
    quantization_bits: Annotated[int, Field(ge=0, le=30)] = Field(
        0, description="bits of a masked entry, 8 to 30; 0 is as many as the sum of a round's clients has room for"
    )
    max_examples: Count = Field(10000, description="most examples of a client, for weighting = examples (SecAgg+)")
    ledger_dir: str = Field("", description="where a site keeps its ledger; empty is <state folder>/ledger")


class RunSettings(Group):
    """The run."""

    num_rounds: CountOrZero = Field(12, description="rounds in all; 0 solves the head and trains nothing")
    seed: CountOrZero = Field(0, description="every other seed derives from (seed, round, client)")
    output_dir: str = Field("runs/default", description="folder of adapter/, checkpoints/, metrics.jsonl, config.json")
    resume: bool = Field(False, description="go on from the newest checkpoint in output-dir")
    evaluate_every: Count = Field(1, description="rounds between evaluations; the last is always evaluated")
    keep_best: bool = Field(
        True, description="end with the round of least held-out loss (privacy.mode = none, all clients each round)"
    )
    patience: CountOrZero = Field(
        0, description="rounds without a lower held-out loss after which the run ends; 0 is never (needs keep-best)"
    )
    restart_margin: NonNegative = Field(
        0.0,
        description="how far the held-out loss may be above the best round's; beyond it the next round starts from "
        "that round's adapter; 0 is any (needs keep-best)",
    )
    generate_every: CountOrZero = Field(
        0, description="rounds between generations for prompts of the central test set (causal-lm); 0 is never"
    )
    generate_format: str = Field(
        "", description="json, or a regular expression: what share of the responses has this form is reported"
    )
    generate_examples: Count = Field(32, description="prompts to generate for")
    generate_tokens: Count = Field(64, description="tokens to generate at most")
    keep_checkpoints: Count = Field(2, description="checkpoints kept")
    sinks: str = Field(
        "",
        description="where the rounds' numbers go too, comma-separated: tensorboard, wandb, trackio, mlflow, the name "
        "of an entry point, or package.module:attribute",
    )
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="port on 127.0.0.1 where the server shows Prometheus its metrics; 0 is off"
    )
    threads: CountOrZero = Field(
        0, description="torch threads per process; 0 is cores divided by the processes Flower runs"
    )

    def evaluates(self, round: int) -> bool:
        """Whether ``evaluate-every`` names this round, or it is the last."""
        return round % self.evaluate_every == 0 or round == self.num_rounds
