"""Multiple-choice questions, answered by log-likelihood: encoding, scoring, and an `evaluate` metric that loads offline."""

from .questions import FOLDER, Question, QuestionEncoder, log_likelihoods, score_questions

__all__ = ["FOLDER", "Question", "QuestionEncoder", "log_likelihoods", "score_questions"]
