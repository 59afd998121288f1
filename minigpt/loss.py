"""The negative log likelihood of target tokens, without ever holding the logits of all of them.

The vocabulary projection is the widest product of the model (50,257 columns). It is computed for CHUNK tokens at a time.
Since the head is frozen, the gradient with respect to a chunk's activations is computed right after its logits, which
are then freed:

    logits = hidden @ wte.T          loss = logsumexp(logits) - logits[target]
                          d loss / d hidden = (softmax(logits) - onehot(target)) @ wte
"""

import torch

CHUNK = 1024  # tokens whose logits are held at a time


def nll_sum(hidden, wte, targets):
    """hidden (M, n_embd), wte (vocab_size, n_embd) frozen, targets (M,) -> the sum of -log p(target), float32."""
    return NLL.apply(hidden, wte, targets)


class NLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, wte, targets):
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(hidden), CHUNK):
            target = targets[i : i + CHUNK, None]
            logits = (hidden[i : i + CHUNK] @ wte.T).float()  # (CHUNK, vocab_size)
            logp = torch.log_softmax(logits, dim=-1, out=logits)  # in place: fresh memory costs more than the sums
            loss -= logp.gather(1, target).sum()
            if grad is not None:
                p = logp.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=logp.dtype))  # softmax - onehot
                torch.mm(p.to(wte.dtype), wte, out=grad[i : i + CHUNK])
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None
