"""The closed vocabulary: every word a screen may show, by the role it plays."""

APPS = (
    "Mail", "Maps", "Music", "Camera", "Photos", "Clock", "Notes", "Weather", "Files",
    "Wallet", "Phone", "Chat", "Calendar", "Contacts", "Store", "Books", "Health", "News",
    "Radio", "Games", "Recorder", "Compass", "Video", "Bank", "Travel", "Taxi", "Food",
    "Shop", "Fitness", "Browser", "Scanner", "Podcasts", "Stocks", "Tasks", "Cloud", "Paint",
)  # fmt: skip
BUTTONS = (
    "OK", "Cancel", "Save", "Send", "Next", "Back", "Delete", "Share", "Edit", "Done",
    "Search", "Log in", "Sign up", "Allow", "Deny", "Retry", "Skip", "Accept",
)  # fmt: skip
FIELDS = (
    "Name", "Email", "Password", "City", "Address", "Date", "Message", "Code", "Amount", "Subject",
)  # fmt: skip
ROWS = (
    "Wi-Fi", "Bluetooth", "Display", "Sound", "Battery", "Storage", "Privacy", "Account",
    "Language", "Updates", "Security", "Network", "Keyboard", "Apps", "Printer", "About",
)  # fmt: skip
TITLES = APPS + ROWS
TYPED = (
    "hello", "berlin", "tokyo", "coffee", "thanks", "tomorrow", "garden", "monday", "summer",
    "london", "pizza", "music", "morning", "rain", "ticket", "piano", "yes please", "see you soon",
    "good night", "two tickets", "call me", "on my way",
)  # fmt: skip

LABELS: dict[str, tuple[str, ...]] = {
    "app": APPS,
    "button": BUTTONS,
    "field": FIELDS,
    "row": ROWS,
}
WORDS = APPS + BUTTONS + FIELDS + ROWS
