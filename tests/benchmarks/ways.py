"""Other ways to make a language model translate, each as short as it can be, for comparison with the prefix.

                          source             asks for the target            trained
    prefix                slots of its bank  slots of its bank              the slots
    prompt tuning         P embeddings       P embeddings                   the embeddings (Lester et al. 2021)
    fine-tuning           "fr: "             "\\nen:"                        every weight
    LoRA                  "fr: "             "\\nen:"                        A, B of W + B A (Hu et al. 2022), by peft
    k-shot                "fr: "             "\\nen:", after k such pairs    nothing
    k nearest             the same, the pairs chosen for each sentence       nothing
    k bare                nothing            a newline, after k such pairs   nothing

A way that trains has parameters() and nll(pack(examples)), and that is all that `train` asks for: each gets the same
pairs in the same order. All answer through minigpt.generate, greedily.
"""

import math
import warnings
from collections import Counter
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minigpt import GPT, GPTConfig, checkpoint
from minigpt.attention import PackedBatch
from minigpt.generate import Prompt, generate
from minigpt.loss import nll_sum
from minigpt.model import Embedding
from prefix.data.rows import clean
from prefix.evaluation.few_shot import Shots, few_shot, stop_ids
from prefix.init import from_text
from prefix.sequences import MicroBatch, pack_pairs, pairs_of, separator
from prefix.translation import Translation, answered, translate


def train(way, corpus, steps, lr, batch_size, seed=0, examples=None):
    """As train.py does it, in whole batches: each epoch in an order of its own, AdamW without weight decay, a twentieth
    of the steps as linear warm-up and then linear decay, gradients cut to a norm of 1. examples: (n, 3), which of the
    training split; None: all."""
    pool = corpus.examples("train") if examples is None else examples
    rng, waiting = np.random.default_rng(seed), []
    learned, warmup = list(way.parameters()), max(1, steps // 20)
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in learned], weight_decay=0.0)
    for step in range(steps):
        while len(waiting) < batch_size:
            waiting += pool[rng.permutation(len(pool))].tolist()
        batch = way.pack(pairs_of(corpus, waiting[:batch_size]))
        (way.nll(batch) / len(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        optimizer.step()
        optimizer.zero_grad()
        del waiting[:batch_size]


@torch.no_grad()
def validation_loss(way, corpus, examples=None, batch_size=64):
    """The mean negative log likelihood of the targets of these examples; None: of the validation split."""
    pool, total, targets = (corpus.examples("validation") if examples is None else examples).tolist(), 0.0, 0
    for i in range(0, len(pool), batch_size):
        batch = way.pack(pairs_of(corpus, pool[i : i + batch_size]))
        total, targets = total + float(way.nll(batch)), targets + len(batch.targets)
    return total / targets


def opening(corpus, column, n):
    """The first n tokens of a column's training sentences: where slots and embeddings start, as in train.py."""
    ids = []
    for row in corpus.rows("train"):
        ids += corpus.ids(row, column).tolist()
        if len(ids) >= n:
            break
    return ids[:n]


class Prefix:
    """The slots of this project, as train.py starts them."""

    def __init__(self, directory, tokenizer, corpus, length=10):
        self.model, self.tokenizer, self.sep = GPT.from_pretrained(directory), tokenizer, separator(tokenizer)
        start = {name: opening(corpus, column, length) for column, name in enumerate(corpus.columns)}
        self.banks = from_text(self.model, start, length)

    def parameters(self):
        return self.banks.parameters()

    def pack(self, examples):
        return pack_pairs(examples, self.sep, self.tokenizer.eot)

    def nll(self, batch):
        hidden = self.model.hidden(batch.ids, batch.packed, self.banks.slots())  # (N, n_embd)
        return nll_sum(hidden[batch.target_index], self.model.wte.weight, batch.targets)

    def translate(self, texts, source, target):
        return translate(self.model, self.tokenizer, self.banks, texts, (source, target))

    def save(self, directory):
        self.banks.save(directory / "prefix.safetensors", self.model)


class ExtendedEmbedding(Embedding):
    """The token embedding with learned rows below its own. The head, which reads `weight`, has no part in them."""

    def __init__(self, wte, rows):
        super().__init__(*wte.weight.shape)
        self.weight, self.learned = wte.weight, nn.Parameter(rows)

    def forward(self, ids):
        return F.embedding(ids, torch.cat([self.weight, self.learned]))


class PromptTuning:
    """`length` embeddings for each language, in front of the source and in front of the separator. They are tokens that
    the vocabulary lacks: each has a position of its own, and the model goes through them as through any text."""

    def __init__(self, directory, tokenizer, corpus, length=10):
        self.model, self.tokenizer, self.sep = GPT.from_pretrained(directory), tokenizer, separator(tokenizer)
        start = [opening(corpus, column, length) for column in range(len(corpus.columns))]
        first = self.model.config.vocab_size  # the id of the first learned row
        self.virtual = [list(range(first + b * length, first + (b + 1) * length)) for b in range(len(start))]
        self.names = list(corpus.columns)
        self.model.wte = ExtendedEmbedding(self.model.wte, self.model.wte(torch.tensor(start).flatten()).clone())

    def parameters(self):
        return [self.model.wte.learned]

    def prompt(self, ids, source, target):
        """Source tokens -> all that stands before the separator. source, target: numbers of languages."""
        return [*self.virtual[source], *ids, *self.virtual[target]]

    def pack(self, examples):
        rows = [(self.prompt(source, s, t), target, s, t) for source, target, s, t in examples]
        return pack_pairs(rows, self.sep, self.tokenizer.eot)

    def nll(self, batch):
        hidden = self.model.hidden(batch.ids, batch.packed)  # (N, n_embd)
        return nll_sum(hidden[batch.target_index], self.model.wte.weight, batch.targets)

    def translate(self, texts, source, target):
        numbers, prompts = [self.names.index(name) for name in (source, target)], {}
        for i, text in enumerate(texts):
            ids = self.tokenizer.encode(clean(text))
            prompts[i] = fitted(self.model, [*self.prompt(ids, *numbers), self.sep], len(ids))
        return greedy(self.model, self.tokenizer, prompts, [self.tokenizer.eot])

    def save(self, directory):
        save_file({"embeddings": self.model.wte.learned.detach()}, directory / "embeddings.safetensors")


class FineTuning:
    """All weights. The languages' names, written as in a k-shot prompt without shots, say what is wanted."""

    def __init__(self, directory, tokenizer, corpus):
        self.model, self.tokenizer, self.names = GPT.from_pretrained(directory), tokenizer, corpus.columns

    def parameters(self):
        return self.model.parameters()

    def pack(self, examples):
        rows, answers = [], []
        encode, decode = self.tokenizer.encode, self.tokenizer.decode
        for source, target, s, t in examples:
            answers.append([*encode(" " + decode(target)), self.tokenizer.eot])
            rows.append(encode(question(decode(source), self.names[s], self.names[t])) + answers[-1][:-1])
        lengths = [len(row) for row in rows]
        last = torch.tensor(lengths).cumsum(0).tolist()
        at = [torch.arange(end - len(answer), end) for end, answer in zip(last, answers)]
        return MicroBatch(torch.tensor(sum(rows, [])), PackedBatch(lengths), torch.cat(at), torch.tensor(sum(answers, [])))

    def hidden(self, batch):
        return self.model.hidden(batch.ids, batch.packed)  # (N, n_embd)

    def nll(self, batch):
        hidden = self.hidden(batch)[batch.target_index]  # (M, n_embd); the head is trained too, so its gradient is autograd's
        return F.cross_entropy(hidden @ self.head.T, batch.targets, reduction="sum")

    @property
    def head(self):
        return self.model.wte.weight

    @property
    def tuned(self):
        """The model as it now is, as ours."""
        return self.model

    def translate(self, texts, source, target):
        return few_shot(self.tuned, self.tokenizer, Shots([], source, target), texts)

    def save(self, directory):
        checkpoint.save(self.model, directory)


class LoRA(FineTuning):
    """Beside every c_attn a product of two thin matrices, by peft in transformers' GPT-2; the same text as above. At
    rank 10 they hold as many numbers as a prefix of 2 * 10 slots."""

    def __init__(self, directory, tokenizer, corpus, rank=10):
        from peft import LoraConfig, get_peft_model
        from transformers import GPT2LMHeadModel, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.directory, self.tokenizer, self.names = checkpoint.find(directory), tokenizer, corpus.columns
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        self.model = GPT2LMHeadModel.from_pretrained(self.directory, dtype=torch.float32, **no_dropout)
        self.model.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["c_attn"], fan_in_fan_out=True)
        self.peft = get_peft_model(self.model, config)  # which changes self.model itself
        self.learned = [p for p in self.model.parameters() if p.requires_grad]

    def parameters(self):
        return self.learned

    def hidden(self, batch):
        rows = batch.packed.pad(batch.ids)  # (B, T), ragged ends after the text, where nothing looks
        return batch.packed.unpad(self.model.transformer(rows, use_cache=False).last_hidden_state)

    @property
    def head(self):
        return self.model.lm_head.weight

    @cached_property
    def tuned(self):
        """Ours, with each product added to its weight. What peft holds is used up by this."""
        ours = GPT(GPTConfig.from_file(self.directory / "config.json"))
        merged = self.peft.merge_and_unload().transformer.state_dict()
        ours.load_state_dict(merged)
        return ours.requires_grad_(False)

    def save(self, directory):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.peft.save_pretrained(directory)
        (directory / "README.md").unlink(missing_ok=True)  # a template of a model card


# Without training


def question(text, source, target):
    return f"{source}: {clean(text)}\n{target}:"


def fitted(model, ids, n_source):
    """A Prompt with room for the answer, as translation.translate has it; within the context."""
    return Prompt(ids, min(2 * n_source + 16, model.config.n_positions - len(ids)))


def greedy(model, tokenizer, prompts, stop):
    """{number: Prompt} for each sentence -> a list of Translation."""
    results = [Translation() for _ in prompts]
    return answered(results, prompts, lambda prompts: generate(model, prompts, stop), tokenizer)


class Nearest:
    """Which of these texts are most like another one? TF-IDF over character trigrams, compared by cosine."""

    def __init__(self, texts):
        self.n, counts = len(texts), [trigrams(text) for text in texts]
        self.idf = {gram: math.log(1 + self.n / n) for gram, n in Counter(g for c in counts for g in c).items()}
        found = {}  # trigram: the texts that have it, and their weights
        for number, count in enumerate(counts):
            for gram, weight in self.vector(count).items():
                found.setdefault(gram, []).append((number, weight))
        self.found = {gram: [np.array(x) for x in zip(*pairs)] for gram, pairs in found.items()}

    def vector(self, count):
        """{trigram: weight}, of length 1; trigrams that no text has are left out."""
        weights = {gram: n * self.idf[gram] for gram, n in count.items() if gram in self.idf}
        norm = math.sqrt(sum(w * w for w in weights.values()))
        return {gram: w / norm for gram, w in weights.items()}

    def similarity(self, text):
        """The cosine with each text: (n,)."""
        scores = np.zeros(self.n)
        for gram, weight in self.vector(trigrams(text)).items():
            numbers, weights = self.found[gram]
            scores[numbers] += weight * weights
        return scores

    def __call__(self, text, k):
        """The numbers of the k texts most like this one, the likest last; of equals, the first."""
        return np.argsort(-self.similarity(text), kind="stable")[:k][::-1]


def trigrams(text):
    """How often each run of three characters is there, the ends of the text counting as spaces."""
    text = f" {text.casefold()} "
    return Counter(text[i : i + 3] for i in range(len(text) - 2))


def nearest_shots(model, tokenizer, pairs, texts, source, target, k):
    """For each text a prompt of its own, with the k of `pairs` (source, target) whose source is likest, the likest
    next to it -> (a list of Translation, for how many texts fewer fitted into the context)."""
    nearest, prompts, fewer = Nearest([text for text, _ in pairs]), {}, 0
    for i, text in enumerate(texts):
        shots = [pairs[number] for number in nearest(text, k)]
        asked = tokenizer.encode(question(text, source, target))
        room = model.config.n_positions - 2 * len(asked)  # an answer may be as long as the question
        while len(ids := tokenizer.encode(Shots(shots, source, target).text)) > room and shots:
            shots = shots[1:]
        fewer += len(shots) < k
        prompts[i] = fitted(model, ids + asked, len(asked))
    return greedy(model, tokenizer, prompts, stop_ids(tokenizer)), fewer
