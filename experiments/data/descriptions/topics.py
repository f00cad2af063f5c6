"""Subjects: newsgroups and newswire."""

from experiments.data.descriptions.label import Label

TOPICS: dict[str, dict[str, Label]] = {
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
}
