"""GenRecal in plain torch, sample by sample in double precision; nothing of ours but weights.

Uses the encoders' tokens and transformers' own models and blocks. No padding, no packing, no
chunking, no custom autograd, no ZeRO: what the two-rank run must reproduce.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from tests.next_byte import kl_spelt_out, spelt_out


@dataclass
class Reference:
    teacher: torch.nn.Module  # HF models in double precision
    student: torch.nn.Module
    recalibrator: torch.nn.Module | None
    stage: str
    projection: torch.nn.Module | None = None  # of stage dskd
    pieces: tuple[list, list] | None = None  # bytes of the teacher's and the student's tokens
    ce_weight: float = 1.0  # of the student's own

    def hidden(self, model: torch.nn.Module, chat) -> torch.Tensor:
        """[T, width] of one conversation."""
        vision = {
            key: value.double() if value.is_floating_point() else value
            for key, value in chat.vision.items()
        }
        per_token = {key: value[None] for key, value in chat.per_token.items()}
        output = model.model(
            input_ids=chat.input_ids_T[None], use_cache=False, **vision, **per_token
        )
        return output.last_hidden_state[0]

    def loss(self, pairs: Iterable) -> torch.Tensor:
        """The loss of a whole optimizer step: sums over all its rows, divided once."""
        pairs = list(pairs)
        student_tokens = sum(end - start for p in pairs for start, end in p.student.answers)
        total = torch.zeros((), dtype=torch.float64)
        teacher_tokens = 0
        for pair in pairs:
            with torch.set_grad_enabled(self.stage != "align"):
                z_s = self.hidden(self.student, pair.student)
            if self.stage != "align":
                total = total + self.ce_weight * self.student_ce(z_s, pair.student) / student_tokens
            if pair.teacher is not None:
                teacher_tokens += sum(end - start for start, end in pair.teacher.answers)
        if self.stage == "mot":
            for pair in pairs:
                total = total + 0.15 * self.optimal_transport(pair) / student_tokens
        if self.stage in ("uld", "logit_kd", "dskd"):
            for pair in pairs:
                total = total + self.token_distances(pair) / student_tokens
        if self.stage == "byte_kd":
            for pair in pairs:
                total = total + self.byte_distances(pair) / student_tokens
        if self.recalibrator is not None:
            for pair in pairs:
                total = total + self.teacher_terms(pair) / teacher_tokens
        return total

    def byte_distances(self, pair) -> torch.Tensor:
        """Next byte against next byte, one by one, over the text that both sides' tokens spell."""
        with torch.no_grad():
            z_l = self.hidden(self.teacher, pair.teacher)
        z_s = self.hidden(self.student, pair.student)
        total = torch.zeros((), dtype=torch.float64)
        for (s0, s1), (t0, t1) in zip(pair.student.answers, pair.teacher.answers, strict=True):
            sides = []
            for model, z, chat, start, end, pieces in (
                (self.teacher, z_l, pair.teacher, t0, t1, self.pieces[0]),
                (self.student, z_s, pair.student, s0, s1, self.pieces[1]),
            ):
                ids, said = chat.input_ids_T[start:end].tolist(), []
                stop = ids[-1]
                for place, token in enumerate(ids):
                    p = model.lm_head(z[start - 1 + place]).softmax(-1)
                    depths = range(len(pieces[token])) if token != stop else (0,)
                    said += [(p, pieces, stop, token, depth) for depth in depths]
                text = b"".join(pieces[token] for token in ids[:-1])
                blanks = len(text) - len(text.lstrip(b" "))
                sides.append((text.lstrip(b" "), said[blanks:]))
            assert sides[0][0] == sides[1][0]
            for theirs, ours in zip(sides[0][1], sides[1][1], strict=True):
                total = total + kl_spelt_out(spelt_out(*theirs), spelt_out(*ours))
        return total

    def token_distances(self, pair) -> torch.Tensor:
        """Sums over the tokens that both sides have of a turn, one by one."""
        with torch.no_grad():
            z_l = self.hidden(self.teacher, pair.teacher)
        z_s = self.hidden(self.student, pair.student)
        total = torch.zeros((), dtype=torch.float64)
        for (s0, s1), (t0, t1) in zip(pair.student.answers, pair.teacher.answers, strict=True):
            for place in range(min(s1 - s0, t1 - t0)):
                p = self.teacher.lm_head(z_l[t0 - 1 + place]).softmax(-1)
                if self.stage == "dskd":
                    r = self.projection(z_s[s0 - 1 + place])
                    q = self.teacher.lm_head(r).softmax(-1)
                    total = total + (p * (p / q).log()).sum()
                    continue
                q = self.student.lm_head(z_s[s0 - 1 + place]).softmax(-1)
                if self.stage == "logit_kd":
                    total = total + (q * (q / p).log()).sum()  # the recipe says reverse_kl
                    continue
                longest = max(len(p), len(q))
                p_sorted, q_sorted = (
                    torch.cat([v, v.new_zeros(longest - len(v))]).sort().values for v in (p, q)
                )
                total = total + (p_sorted - q_sorted).abs().sum()
        return total

    def optimal_transport(self, pair) -> torch.Tensor:
        """MOT of one conversation, cell by cell, with Sinkhorn's plain divisions."""

        def rows(model, chat):
            hidden = self.hidden(model, chat)
            spans = [range(start - 1, end - 1) for start, end in chat.answers]
            return [model.lm_head(hidden[list(span)]) for span in spans]

        def ranked(logits, temperature):
            p = (torch.cat(logits) / temperature).softmax(-1)
            order = sorted(range(p.shape[1]), key=lambda v: -float(p[:, v].sum()))
            return p[:, order[:50]]

        with torch.no_grad():
            theirs = rows(self.teacher, pair.teacher)
        ours = rows(self.student, pair.student)
        t, s = ranked(theirs, 1.0), ranked(ours, 1.0)
        total, first_t, first_s = torch.zeros((), dtype=torch.float64), 0, 0
        for turn_t, turn_s in zip(theirs, ours, strict=True):
            for place in range(min(len(turn_t), len(turn_s))):
                a, b = t[first_t + place], s[first_s + place]
                total = total + (a - b).abs().sum() - 0.1 * (a * b.log()).sum()
            first_t, first_s = first_t + len(turn_t), first_s + len(turn_s)
        t, s = ranked(theirs, 2.0), ranked(ours, 2.0)
        cost = torch.stack([(row - t).abs().sum(-1) for row in s])
        plan = (-cost / 0.1).exp()
        for _ in range(20):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        return total + 0.1 * (plan * cost).sum()

    def student_ce(self, z_s: torch.Tensor, chat) -> torch.Tensor:
        total = 0.0
        for start, end in chat.answers:
            logits = self.student.lm_head(z_s[start - 1 : end - 1])
            total = total + cross_entropy(logits, chat.input_ids_T[start:end], reduction="sum")
        return total

    def teacher_terms(self, pair) -> torch.Tensor:
        with torch.no_grad():
            z_l = self.hidden(self.teacher, pair.teacher)
        with torch.set_grad_enabled(self.stage != "align"):
            z_s = self.hidden(self.student, pair.student)
        total = torch.zeros((), dtype=torch.float64)
        projected = z_l @ self.recalibrator.proj_pre.weight.T
        total = total + self.one_pass(pair, z_l, z_s, pair.student.questions, projected)
        if self.stage == "align":
            total = total + self.one_pass(pair, z_l, projected, pair.teacher.questions, projected)
        return total

    def one_pass(self, pair, z_l, question_rows, questions, answer_rows) -> torch.Tensor:
        """q1 a1 .. qK aK through the blocks; CE + KL on the rows that predict the answers."""
        chat, parts, wanted, labels, targets, length = pair.teacher, [], [], [], [], 0
        for (q0, q1), (a0, a1) in zip(questions, chat.answers, strict=True):
            parts += [question_rows[q0:q1], answer_rows[a0:a1]]
            length += q1 - q0
            wanted += range(length - 1, length + a1 - a0 - 1)
            length += a1 - a0
            labels.append(chat.input_ids_T[a0:a1])
            targets.append(z_l[a0 - 1 : a1 - 1])
        hidden = self.recalibrator.blocks(inputs_embeds=torch.cat(parts)[None], use_cache=False)
        r = self.recalibrator.proj_post(hidden.last_hidden_state[0])[wanted]
        norm = self.recalibrator.norm
        r = r * torch.rsqrt(r.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
        log_q = self.teacher.lm_head(r).log_softmax(-1)
        log_p = self.teacher.lm_head(torch.cat(targets)).log_softmax(-1)
        ce = cross_entropy(log_q, torch.cat(labels), reduction="sum")
        return ce + (log_p.exp() * (log_p - log_q)).sum()
