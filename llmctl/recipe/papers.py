"""The papers that variants come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """Who and when; without an arXiv id it is no paper, or one that is not there."""

    name: str
    year: int
    arxiv: str | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.year})" + (f", arXiv:{self.arxiv}" if self.arxiv else "")


TRANSFORMER = Paper("Vaswani et al.", 2017, "1706.03762")
RMS = Paper("Zhang and Sennrich", 2019, "1910.07467")
GEMMA = Paper("Gemma", 2024, "2403.08295")
GEMMA2 = Paper("Gemma 2", 2024, "2408.00118")
LAYER_NORM = Paper("Ba et al.", 2016, "1607.06450")
PRE_NORM = Paper("Xiong et al.", 2020, "2002.04745")
SANDWICH = Paper("CogView, Ding et al.", 2021, "2105.13290")
ROPE = Paper("RoFormer, Su et al.", 2021, "2104.09864")
CONVS2S = Paper("Gehring et al.", 2017, "1705.03122")
T5 = Paper("T5, Raffel et al.", 2020, "1910.10683")
ALIBI = Paper("ALiBi, Press et al.", 2022, "2108.12409")
NOPE = Paper("Kazemnejad et al.", 2023, "2305.19466")
INTERPOLATION = Paper("Chen et al.", 2023, "2306.15595")
NTK = Paper("bloc97", 2023)
YARN = Paper("YaRN, Peng et al.", 2023, "2309.00071")
LLAMA = Paper("LLaMA, Touvron et al.", 2023, "2302.13971")
LLAMA3 = Paper("Llama 3", 2024, "2407.21783")
GQA = Paper("Ainslie et al.", 2023, "2305.13245")
MQA = Paper("Shazeer", 2019, "1911.02150")
MLA = Paper("DeepSeek-V2", 2024, "2405.04434")
DEEPSEEK3 = Paper("DeepSeek-V3", 2024, "2412.19437")
MISTRAL = Paper("Mistral 7B", 2023, "2310.06825")
MIXTRAL = Paper("Mixtral", 2024, "2401.04088")
LONGFORMER = Paper("Longformer, Beltagy et al.", 2020, "2004.05150")
BIGBIRD = Paper("BigBird, Zaheer et al.", 2020, "2007.14062")
ETC = Paper("ETC, Ainslie et al.", 2020, "2004.08483")
BLOCKWISE = Paper("Qiu et al.", 2020, "1911.02972")
ROUTING = Paper("Roy et al.", 2020, "2003.05997")
REFORMER = Paper("Reformer, Kitaev et al.", 2020, "2001.04451")
MAMBA2 = Paper("Mamba-2, Dao and Gu", 2024, "2405.21060")
GLU = Paper("Shazeer", 2020, "2002.05202")
GELU = Paper("Hendrycks and Gimpel", 2016, "1606.08415")
PRIMER = Paper("Primer, So et al.", 2021, "2109.08668")
MOE = Paper("Shazeer et al.", 2017, "1701.06538")
MIXTURE = Paper("Jacobs et al.", 1991)
SMEAR = Paper("SMEAR, Muqeeth et al.", 2023, "2306.03745")
SOFT_MOE = Paper("Soft MoE, Puigcerver et al.", 2023, "2308.00951")
EXPERT_CHOICE = Paper("Zhou et al.", 2022, "2202.09368")
DEEPSEEK_MOE = Paper("DeepSeekMoE", 2024, "2401.06066")
SWITCH = Paper("Switch, Fedus et al.", 2021, "2101.03961")
ST_MOE = Paper("ST-MoE, Zoph et al.", 2022, "2202.08906")
BALANCE = Paper("Wang et al.", 2024, "2408.15664")
DECODER = Paper("Liu et al.", 2018, "1801.10198")
BERT = Paper("BERT, Devlin et al.", 2018, "1810.04805")
ROBERTA = Paper("RoBERTa, Liu et al.", 2019, "1907.11692")
GPT2 = Paper("GPT-2, Radford et al.", 2019)
QWEN = Paper("Qwen", 2023, "2309.16609")
QWEN2 = Paper("Qwen2", 2024, "2407.10671")
QWEN3 = Paper("Qwen3", 2025, "2505.09388")
PHI3 = Paper("Phi-3", 2024, "2404.14219")
QK_NORM = Paper("Henry et al.", 2020, "2010.04245")
TYING = Paper("Press and Wolf", 2017, "1608.05859")
DROPOUT = Paper("Srivastava et al.", 2014)
MUP = Paper("Yang et al.", 2022, "2203.03466")
