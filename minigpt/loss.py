"""The vocabulary projection, and the negative log likelihood of targets without holding the logits of all of them.

The projection is the widest product of the model (50,257 columns). For a loss it is computed for CHUNK tokens at a time.
Since the head is frozen, the gradient with respect to a chunk's activations is computed right after its logits, which
are then freed:

    logits = hidden @ wte.T          loss = logsumexp(logits) - logits[target]
                          d loss / d hidden = (softmax(logits) - onehot(target)) @ wte

A GPU's logits are float32 also where the model is not: GPT-2's lie near -100, where bfloat16 holds multiples of 0.5 only.
And there rows of zeros follow wte in memory (checkpoint.load_weights): a GPU multiplies multiples of 64 faster.
"""

import torch

CHUNK = 1024  # tokens whose logits are held at a time
PAD = 64  # rows, for a GPU's products


class NLL(torch.autograd.Function):
    """hidden (M, n_embd), wte (vocab_size, n_embd) frozen, targets (M,) -> the sum of -log p(target), float32."""

    @staticmethod
    def forward(ctx, hidden, wte, targets):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), CHUNK):
            target = targets[i : i + CHUNK, None]
            logits = project(hidden[i : i + CHUNK], wte).float()  # (CHUNK, vocab_size), and padding
            logp = torch.log_softmax(logits, dim=-1, out=logits)  # in place: to take another such memory is slower
            loss -= logp.gather(1, target).sum()
            if grad is not None:
                p = logp.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=logp.dtype))  # softmax - onehot
                torch.mm(p.to(wte.dtype), padded(wte), out=grad[i : i + CHUNK])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None


nll_sum = NLL.apply


def project(hidden, wte):
    """hidden (M, n_embd), wte (vocab_size, n_embd) -> logits (M, at least vocab_size), -inf past vocab_size."""
    rows = padded(wte)
    if not wte.is_cuda or wte.dtype == torch.float32:
        logits = hidden @ rows.T
    elif torch.is_grad_enabled() and hidden.requires_grad:  # the product below has no gradient
        logits = hidden.float() @ rows.T.float()
    else:
        logits = torch.mm(hidden, rows.T, out_dtype=torch.float32)
    if len(rows) > len(wte):
        logits[:, len(wte) :] = -torch.inf
    return logits


def padded(wte):
    """wte with the rows of zeros that follow it, if any do."""
    rows, n_embd = padded_rows(len(wte)), wte.size(1)
    has_them = wte.is_cuda and wte.untyped_storage().nbytes() == rows * n_embd * wte.itemsize
    return wte.as_strided((rows, n_embd), wte.stride()) if has_them else wte


def padded_rows(n):
    return -(-n // PAD) * PAD
