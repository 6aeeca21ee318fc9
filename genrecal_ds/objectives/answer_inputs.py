"""What the Recalibrator reads in the place of the teacher's answer rows. Ours, off by default.

In the paper row a_i of the mixed pass receives z_al[i], from which the teacher's head already
reads a_(i+1): only the first answer token of a turn is learnt through the student's question.
Token embeddings say which token stands there and nothing of what comes; masks and noise take part
of the row away. Only in training, but for embeddings of all conversations.

Shapes: A teacher rows entering the Recalibrator, N answer rows among them, which come first,
V vocabulary, H teacher width.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from genrecal_ds.data.batch import TeacherBatch
from genrecal_ds.recipe.stage_config import AnswersConfig

SPAN = 3  # rows that are zeroed together


class AnswerInputs:
    def __init__(
        self, config: AnswersConfig | None = None, embedding_VH: Tensor | None = None
    ) -> None:
        """embedding_VH: the teacher's, in host memory; needed where config.embeddings is not 0."""
        self.config, self.embedding_VH = config or AnswersConfig(), embedding_VH

    def __call__(self, inputs_AH: Tensor, teacher: TeacherBatch, is_training: bool) -> Tensor:
        """inputs_AH with other answer rows; the same tensor where nothing is changed."""
        config = self.config
        share = config.embeddings if is_training else float(config.embeddings == 1)
        is_changed = share or (is_training and (config.masked or config.noise))
        if not is_changed:
            return inputs_AH
        num_answers = len(teacher.labels_N)  # a turn's loss rows are as many as its answer rows
        rows_NH = inputs_AH[:num_answers]
        if is_training and config.noise:
            scale_N1 = rows_NH.float().square().mean(-1, keepdim=True).sqrt()
            noise_NH = torch.randn_like(rows_NH) * (config.noise * scale_N1).to(rows_NH.dtype)
            rows_NH = rows_NH + noise_NH
        if is_training and config.masked:
            rows_NH = rows_NH * (~self._masked(num_answers, rows_NH.device))[:, None]
        if share:
            is_other_N = self._chosen(teacher, share)
            rows_NH = torch.where(is_other_N[:, None], self._embedded(teacher, rows_NH), rows_NH)
        return torch.cat([rows_NH, inputs_AH[num_answers:]])

    def _embedded(self, teacher: TeacherBatch, rows_NH: Tensor) -> Tensor:
        """Of the answer tokens, which are the labels."""
        assert self.embedding_VH is not None
        tokens = teacher.labels_N.clamp(min=0).to(self.embedding_VH.device)
        return embedding(tokens, self.embedding_VH).to(rows_NH)

    def _chosen(self, teacher: TeacherBatch, share: float) -> Tensor:
        """[N]: rows of the conversations that get embeddings, each as a whole."""
        packing, num_answers = teacher.packing, len(teacher.labels_N)
        sequence_N = packing.sequence_P[packing.loss_rows[:num_answers]]
        drawn = torch.rand(packing.num_sequences, device=sequence_N.device)
        return drawn[sequence_N] < share

    def _masked(self, num_answers: int, device: torch.device) -> Tensor:
        """[N]: spans over the rows one after another, so that `masked` of them are zeroed."""
        starts = torch.rand(num_answers, device=device) < 1 - (1 - self.config.masked) ** (1 / SPAN)
        reach = starts.clone()
        for step in range(1, min(SPAN, num_answers)):
            reach[step:] |= starts[:-step]
        return reach
