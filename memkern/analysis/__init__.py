"""What training and evaluation runs are judged by: metrics, trackers, plots. Results in, numbers and files out."""

from memkern.analysis.retrieval_metrics import mean_reciprocal_rank, ndcg_at_k, recall_at_k, retrieval_report

__all__ = ["mean_reciprocal_rank", "ndcg_at_k", "recall_at_k", "retrieval_report"]
