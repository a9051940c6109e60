"""hotrepl: talk to a running Python process, look around in it, and change it while it runs.

One file, standard library only, CPython 3.6 to 3.15 and PyPy3. Copy it beside your program.

    import hotrepl                                  # in the program
    hotrepl.start(locals=globals())

    python hotrepl.py connect                       # in another terminal; or: nc 127.0.0.1 1337

SECURITY. A REPL is a back door by design: who gets in can do whatever this process can. By
default only 127.0.0.1 is bound and only processes of your own user are let in; other
addresses want a token, TLS or ssh. The README has the table.

AT THE PROMPT. All Python, plus names where they are free: doc, help, server_print, bg, fg, jobs,
halt, reload, patch, main_thread, stacks, frames, at, watch, follow; `obj?`, `obj??`, `_`, `await`.
Ctrl+C interrupts, Ctrl+Z sends the evaluation to the background, Ctrl+D leaves.

HOW IT WORKS. A daemon thread accepts connections. Each REPL connection gets a thread with its own
console; all consoles share one namespace, the dict given to `start`. What a session's thread
prints goes to its client, what any other thread prints goes where it always went. The REPL channel
is plain text, so netcat is a full client. A second connection, the control channel, carries what
must not wait behind the text: completions, interrupts. The server says exactly when it waits for
input, so the client never guesses. Nothing runs and nothing is changed for a program's own
output while nobody is connected.

WHAT IS TOUCHED IN THE PROCESS, and put back. While a session is open: sys.stdin, stdout, stderr,
displayhook and unraisablehook, os.get_terminal_size, system, _exit, abort, execv and execve, and
getpass.getpass are stand-ins; pdb is adapted, or sys.meta_path watched for it; sys.last_type,
last_value, last_traceback (and last_exc) are set by an exception in a session; logging's record
factory is ours while somebody follows. From start to stop: names in the namespace, where they are
free, and a module of that name where it had no __name__; one atexit callback; SIGURG's handler,
where it was free and start ran in the main thread. While modules for sessions are imported, once,
and while a connection is accepted: a shorter sys.setswitchinterval. For the rest of the process:
one fork handler (3.6: os.fork itself). linecache keeps the last 1,000 inputs that define
something or raise.

LIMITS. A blocking call in C is interrupted when it returns, not before. The frame of a loop that
runs keeps its code; the next call inside it sees the new one. A line or block has at most 16 MiB,
a control message 1 MiB. On Windows there is no readline and no fork. Where gevent patches the
standard library after start(), or under `serve`, nobody can come in.

CONTENTS, and where to look for what. A section uses only sections above it; 14 only 2, 3, 10.
`grep -n '^# [=-]' hotrepl.py` prints sections and their rooms; each begins with how it works.
     1. Imports, version, exports
     2. Constants and errors
     3. Wire protocol         bytes <-> checked messages and turn marks; no socket, no thread
     4. Thread streams        each thread prints to its own session; what stands in sys, os and
                              getpass (StreamRouter.PLACES); follow()
     5. Interrupts            raise in another thread, never at a wrong moment: Interrupts.request
     6. Consoles              choose and adapt a console; a typed line is compiled in
                              ConsoleMixin.run_line, a block in run_block; completion
     7. Jobs                  background callables; calls in the main thread; await
     8. Hot patching          know, diff, apply, tell; an old function is given its new code by
                              _assign_code
     9. Session tools         the names a user finds at the prompt; frames, watch, editors' code
    10. Access                who may come in: Door.check_peer and ask_token, which raise Refused;
                              private files; TLS; whom a client talks to: dial
    11. Sessions              one console from hello to goodbye; values and exceptions are shown
                              by the Evaluator; pdb
    12. Control channel       answer commands, one method each: Complete, KeyboardInterrupt, ...
    13. Server                start and stop as one transaction; a refused peer's connection is
                              closed in Server._accept_one, or in Admission.run; fork
    14. Client                link, conversation, terminal; kept_modes puts the terminal back,
                              also after getpass
    15. Command line          argv -> exit code

WORDS. A *session* is one client's conversation; a *peer* the process at its other end. It has a
*REPL channel*, text, and may have a *control channel*, messages; who has both has *paired* them.
An *evaluator* is the thread of a session; its *console* compiles what comes; all sessions share
one *namespace*. A *turn* is a wait for input; its *prompt* is the text, its *mark* the bytes that
announce it to a client that asked for marks. An *input* is what the client answers.
An *evaluation* is the run of one input, and has an *outcome*; with its thread it can become a
*job*. An *errand* is a call that another thread makes for a session, which waits. A *stand-in* is
what the process has in place of sys.stdout and the like while a session is open. To *reload* is
to make the files on disk what runs, to *patch* to do so with one function; what can't follow is
*stale*. The *program* is what hotrepl was imported into.

LEFT OUT on purpose, so that nobody adds it unknowingly:
  - Several files, dependencies, a pip package: who copies one file owns what runs in production.
  - A thread or a timer for each session beside its own, polling: idle must cost nothing.
  - A cache of completions or of modules' folders: a wrong list is worse than 10 ms.
  - Completion that evaluates (properties, calls), as IPython's: it would run the program. Of file
    names: they are of the server's machine, and a string is mostly none.
  - Colours and history in the server: they are the client's, and netcat's user wants none.
  - Access control within a session: who can run Python can undo it.
  - Reload when a file is saved: half an edit would run; a person, or an editor, says when.
  - An interrupt by signals, a trace function or bytecode: each changes what the program does.
  - A pickled or binary protocol: it would run code before anybody is let in.

Founded on the REPL server of unpythonic (Juha Jeronen), after Swank. Further sources are named in
the README. SPDX-License-Identifier: MIT; the text is at the end.
"""

# === 1. Imports, version, exports ============================================
# What start() needs, and no more. All else (argparse, ast, asyncio, code, ctypes, inspect, json,
# logging, readline, ssl, traceback, ...) is imported in the functions that use it, so that
# a program which starts a server and is never visited pays for none of it.

# Of signal, struct and weakref the part in C: the rest of them takes long, and is not used here.
import _imp
import _signal as signal
import _struct as struct
import _weakref as weakref
import atexit
import builtins
import collections
import errno
import functools
import gc
import io
import itertools
import keyword
import operator
import os
import select
import socket
import stat
import sys
import threading
import time
import types
from _operator import _compare_digest as compare_digest   # hmac's, without OpenSSL
from contextlib import ExitStack, contextmanager, suppress

__version__ = "0.1.0"
__all__ = ["start", "stop", "Server", "connect", "reload", "patch", "unpatch", "changes", "undo",
           "on_reload", "ReloadReport", "ReloadError", "async_raise", "Job"]


class Lazy:
    """Stands for what `make()` returns; that is called at each first use of an attribute."""

    def __init__(self, make):
        self._make = make

    def __getattr__(self, name):
        value = getattr(self._make(), name)
        setattr(self, name, value)
        return value


re = Lazy(lambda: __import__("re"))       # its import takes as long as half of ours


class Logger:
    """Stands for logging's logger `name`; does nothing while the program has not imported logging.

    Until then nobody can listen, and the import takes longer than all else that start() needs.
    """

    def __init__(self, name):
        self._name = name
        self._logger = None       # logging's own, once there is one; set by whoever logs first

    def __getattr__(self, method):
        if self._logger is None:
            if "logging" not in sys.modules:
                return _no_log
            import logging
            self._logger = logging.getLogger(self._name)
            self._logger.addHandler(logging.NullHandler())
        return getattr(self._logger, method)


def _no_log(*args, **options):
    """Log nothing, enable nothing."""


log = Logger("hotrepl")


# === 2. Constants and errors =================================================
# What more than one section needs to agree on: defaults, limits, the exception types, records, and
# small helpers for sockets and texts. Nothing here knows what a session is; any thread may call it.

DEFAULT_BIND = "127.0.0.1"
DEFAULT_PORT = 1337
DEFAULT_CONTROL_PORT = 8128

RECEIVE_BYTES = 65536             # how much one recv asks for
INPUT_LIMIT_BYTES = 16 << 20      # the longest line or block that a session accepts
MESSAGE_LIMIT_BYTES = 1 << 20     # the longest body of a control message
CHUNK_BYTES = 65536               # printed text is sent in pieces of about this size ...
FLUSH_INTERVAL_S = 0.008          # ... or after this time, whichever comes first
COMPLETION_TIMEOUT_S = 2.0        # how long an object's own __dir__ may take
OUTCOME_LIMIT = 30000             # characters of a text in the reply to Outcome
NOTE_NAME = "server-%d-%s.note"   # in the runtime folder; by these the client finds servers
NOTE_LIMIT_BYTES = 4 << 20        # of one; it has all of sys.argv
MAX_SESSIONS = 300                # open at once, unless start() is told another number
STOP_TIMEOUT_S = 1.0              # how long stop() waits for the threads of its sessions
BACKLOG = 1024                    # connections that the system keeps while we accept others
CLOSE_TIMEOUT_S = 0.2             # how long a closed connection waits for the peer to close it too
IS_PYPY = sys.implementation.name == "pypy"
OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
# For send, since a program may let SIGPIPE end it; PyPy 7.3 has no name for it.
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0x4000 if sys.platform.startswith("linux") else 0)

# As in inspect, whose import takes longer than all else: the code of a function, not of a module
# or a class body; the code of a coroutine function.
CO_OPTIMIZED, CO_COROUTINE = 0x1, 0x80
HEAP_TYPE = 1 << 9                # Py_TPFLAGS_HEAPTYPE, in `__flags__`: a class statement made it

CONTROL_SUFFIX = ".control"       # unix sockets: the control channel's is beside the REPL channel's
TOKEN_SUFFIX = ".token"           # and so is the file with the token, where there is one
TOKEN_PROMPT = b"token: "         # instead of the first line, where the server can't tell who comes


_MISSING = type("_MISSING", (), {"__repr__": lambda self: "<missing>"})()  # None is a value


class Record(tuple):
    """A tuple with names for its items; `record` makes such classes, as Stale or Command."""

    __slots__ = ()
    names = ()

    def __new__(cls, *values):
        return tuple.__new__(cls, values)

    def __getnewargs__(self):     # for copy and pickle
        return tuple(self)

    def _replace(self, **items):
        return type(self)(*[items.get(name, value) for name, value in zip(self.names, self)])

    def __repr__(self):
        items = ", ".join("%s=%r" % each for each in zip(self.names, self))
        return "%s(%s)" % (type(self).__name__, items)


def record(name, names):
    """Return a class as collections.namedtuple does, which compiles code for each, at import."""
    names = names.split()
    fields = {each: property(operator.itemgetter(at)) for at, each in enumerate(names)}
    return type(name, (Record,), dict(fields, names=names, __slots__=()))


class ProtocolError(Exception):
    """The peer sent something that the protocol does not allow."""


class ReloadError(RuntimeError):
    """A reload was refused or rolled back; the process is as it was before."""


def shorten(value, width=60):
    """Return `value` as one line of at most `width` characters, for messages."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= width else text[:width - 3] + "..."


class OwnSocket(socket.socket):
    """A socket that closes its descriptor only while that is still its own.

    Programs close whole ranges of descriptors (os.closerange), also ours. Python gives the number
    to the next file that is opened, which is not ours to close.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._mark = self._inode()        # of what the descriptor led to at first

    @classmethod
    def adopt(cls, sock):
        """Return `sock` as one of these, in its place."""
        return cls(sock.family, sock.type, sock.proto, sock.detach())

    def accept(self):
        descriptor, address = self._accept()
        return OwnSocket(self.family, self.type, self.proto, descriptor), address

    def is_own(self):
        """Return whether the descriptor leads still to what it led to at first."""
        return self._inode() == self._mark

    def _inode(self):
        try:
            info = os.fstat(self.fileno())
        except OSError:
            # Closed; or on Windows, where a socket's number is no descriptor.
            return None
        return info.st_dev, info.st_ino

    def _real_close(self, *args):
        if self.is_own():
            super()._real_close(*args)
        else:
            self.detach()


def is_own(sock):
    """Return False where `sock`, of whatever class, has a descriptor that is another file's now."""
    return not isinstance(sock, OwnSocket) or sock.is_own()


def wait_for(readers, writers=(), timeout_s=None):
    """Return those of the sockets that can be read or written, or are over; blocks.

    As select.select(), which takes no descriptor above 1023.
    """
    if not hasattr(select, "poll"):       # Windows
        return sum(select.select(readers, writers, [], timeout_s), [])
    events = dict.fromkeys(readers, select.POLLIN)
    for each in writers:
        events[each] = events.get(each, 0) | select.POLLOUT
    poll = select.poll()
    for each, event in events.items():
        poll.register(each, event)
    found = {number for number, _ in poll.poll(timeout_s and timeout_s * 1000)}
    return [each for each in events if each.fileno() in found]


def entered(undo, context):
    """Enter `context` and return what that gives; the ExitStack `undo` leaves it.

    As undo.enter_context(), but 3.15's imports inspect: longer than all else that start() does.
    """
    value = context.__enter__()
    undo.callback(context.__exit__, None, None, None)
    return value


def printable(text):
    """Return `text` with each character escaped that a terminal would obey, not show.

    Those are control characters and the marks that turn the direction of writing.
    """
    return "".join(each if each.isprintable() or each == "\n" else
                   each.encode("unicode_escape").decode("ascii") for each in text)


def is_python_function(value):
    """Return whether it is a function with Python code; PyPy's builtins are functions without."""
    return type(value) is types.FunctionType and type(value.__code__) is types.CodeType


def say(text):
    """Say something to people, on stderr; nothing where that is closed or full."""
    stderr, line = sys.stderr or io.StringIO(), "hotrepl: %s\n" % text
    raw = getattr(getattr(stderr, "buffer", None), "raw", None)
    with suppress(OSError, ValueError):
        # It can be /dev/full, or a closed file.
        if raw is None:
            stderr.write(line)
        else:
            stderr.flush()
            # Past the buffer: what that can't write it keeps, and the program's exit would fail
            # for it.
            raw.write(line.encode(stderr.encoding, "backslashreplace"))


def process_mark(pid):
    """Return a text that tells the process `pid` from a later one of that number; "": unknown."""
    try:
        with open("/proc/%s/stat" % pid, "rb", 0) as file:
            # When it began, in ticks, see proc(5). Before that stands its name, any bytes.
            return file.read().rpartition(b")")[2].split()[19].decode()
    except OSError:
        return ""


def take_all(items):
    """Yield the items of a deque, taken from its left, until it is empty; others may take too."""
    while True:
        try:
            yield items.popleft()
        except IndexError:
            return


# === 3. Wire protocol ========================================================
# Bytes <-> checked messages and marks; no socket, no thread, so every class here can
# be fed one byte at a time in a test. Two rules. On the control channel a message is
# 0xFF "v01" "l" LENGTH ";" BODY, the body one JSON object in UTF-8. On the REPL channel
# all is UTF-8 text but for marks that begin with 0xFF, a byte that UTF-8 never has;
# they are telnet's own commands (RFC 854, RFC 885), so a telnet client agrees with us.
# A literal 0xFF in what a program prints is doubled, as in telnet, for a client that
# asked for marks; any other client gets the bytes as they are. How `1+1` travels:
#
#     server, control    \xffv01l35;{"status": "ok", "result": "None "}   a reply; its length; JSON
#     server, REPL       \xff\xfakprimary\xff\xf0>>> \xff\xf9                kind, prompt, turn
#     client, REPL       1+1\n                                          or \xff\xfab1+1\n2+2\xff\xf0
#     server, REPL       2\n                                            then the next prompt
#
# Server and client read by the same MarkDecoder. All that is decoded here came from outside: what
# the protocol does not allow becomes a ProtocolError or an "invalid" input, of which nothing runs.

IAC = b"\xff"
GO_AHEAD = IAC + b"\xf9"          # server: it waits; all since the last newline is the prompt
END_OF_FILE = IAC + b"\xec"       # client: end of file for whatever reads now; server: goodbye
INTERRUPT = IAC + b"\xf4"         # client: as Ctrl+C (telnet's Interrupt Process)
BEGIN, END = IAC + b"\xfa", IAC + b"\xf0"   # enclose a block, whose first byte is its kind
CTRL_D = b"\x04"                  # client without a secret: at a line's start, as END_OF_FILE
NO_ECHO = IAC + b"\xfb\x01"       # server: the next answer is a secret (WILL ECHO, RFC 857)
BLOCK_KIND = b"b"                 # client: BEGIN "b" lines END, one unit of several lines
SECRET_KIND = b"s"                # client: BEGIN "s" secret END, what PairWithSession has to show
CONTROL_KIND = b"c"               # client: BEGIN "c" END asks; server: BEGIN "c" port proof END
NOTE_KIND = b"n"                  # server: BEGIN "n" lines END, to be shown above the prompt
TURN_KIND = b"k"                  # server: BEGIN "k" word END, before a prompt; the words:
AT_PROMPT = ("primary", "continuation")     # it waits for an input
IN_EVALUATION = ("input", "secret", "debugger")     # what it runs waits for an answer
# server: BEGIN kind END; what comes next is printed, or displayed as the value, or the traceback.
STREAM_KINDS = {"stdout": b"o", "stderr": b"e", "prompt": b"p", "value": b"v", "traceback": b"t"}

Command = record("Command", "name fields doc")

COMMANDS = [  # fields: name -> (types, is it required)
    Command("DescribeServer", {}, "What the server is: its prompts, version and commands."),
    Command("Authenticate", {"token": (str, False), "proof": (str, False)},
            "Show the token, where the server wants one, or the proof that the REPL channel gave "
            "for the control channel; must come first."),
    Command("PairWithSession", {"id": (int, True), "secret": (str, False)},
            "Bind this control connection to REPL session `id`; the commands below need it. "
            "`secret` is what the session's client sent on the REPL channel; without one, both "
            "connections must be the same user's."),
    Command("TurnMarks", {"kinds": (bool, False), "streams": (bool, False)},
            "From now on end every wait for input with 0xFF 0xF9; with `kinds` also say before its "
            "prompt what it is for: primary, continuation, input, secret or debugger; with "
            "`streams` where stdout, stderr, the prompt, a displayed value and a traceback begin."),
    Command("TabComplete", {"text": (str, True), "state": (int, True)},
            "Completion number `state` of the word `text`, or null, as readline counts."),
    Command("Complete", {"line": (str, True), "cursor": (int, False)},
            "All completions at once: `start`, `matches`, `hint`."),
    Command("KeyboardInterrupt", {"turn": (int, False), "answered": (bool, False)},
            "Interrupt the evaluation, or the wait for input. `turn` is the number of turn marks "
            "that the client has seen, `answered` whether it has answered the last: an "
            "evaluation that is over meanwhile is not interrupted, nor is the next."),
    Command("Background", {"turn": (int, False)},
            "Turn the evaluation into a background job; the session goes on with a new prompt."),
    Command("Where", {}, "What the evaluation is doing: `where`, a line of text, or null; while "
            "its output is being sent also `sending`, how many bytes of how many are."),
    Command("Terminal", {"columns": (int, True), "lines": (int, True), "colours": (bool, True)},
            "The client is a terminal of this size that shows colours or not."),
    Command("Place", {"module": (str, False), "file": (str, False), "line": (int, False),
                      "within": (str, False), "name": (str, False)},
            "The next block is from line `line` on of a module's file: it runs in that module, and "
            "what it defines is given to patch(). One of `module` and `file` is needed; `within` "
            "is the class that an indented definition stands in. Or `name` alone, which stands "
            "for the block in tracebacks."),
    Command("Outcome", {},
            "How the last input ended: `state` (running, waiting for input, done, background), and "
            "`value` (its repr), `exception` (type, message, traceback) or `exit` (a SystemExit's "
            "status); long texts are cut."),
]


def encode_message(message):
    """Return `message`, a JSON-serialisable dict, as the bytes of one control message."""
    import json
    body = json.dumps(message).encode("utf-8")
    return IAC + b"v01l%d;" % len(body) + body


class MessageDecoder:
    """Control messages out of a stream of bytes."""

    HEADER = Lazy(lambda: re.compile(rb"\xffv01l([0-9]{1,19});"))
    # Of a header whose end has not come yet, at most.
    HEADER_BYTES = 24

    def __init__(self):
        self._buffer = b""        # what came in and is no complete message yet

    def feed(self, data):
        """Yield the bodies that `data` completes: dicts, or a ProtocolError in place of a bad one.

        Junk between messages is skipped up to the next header. A length over the limit raises
        ProtocolError: after that the stream can't be followed.
        """
        self._buffer += data
        body = self._next_body()
        while body is not None:
            yield _parse_body(body)
            body = self._next_body()

    def _next_body(self):
        """Take the bytes of the first body out of the buffer; None: it is not there as a whole."""
        header = self.HEADER.search(self._buffer)
        if header is None:
            # The beginning of one may have come: keep what could be that.
            self._buffer = self._buffer[-self.HEADER_BYTES:]
            return None
        length = int(header.group(1))
        if length > MESSAGE_LIMIT_BYTES:
            raise ProtocolError("message of %d bytes, expected at most %d"
                                % (length, MESSAGE_LIMIT_BYTES))
        self._buffer = self._buffer[header.start():]
        begin = header.end() - header.start()
        if len(self._buffer) < begin + length:
            return None
        body, self._buffer = self._buffer[begin:begin + length], self._buffer[begin + length:]
        return body


def _parse_body(body):
    """Return the dict that the bytes of a body are, or the ProtocolError that says what is wrong.
    """
    import json
    try:
        message = json.loads(body.decode("utf-8"), parse_int=_parse_int)
        if isinstance(message, dict):
            return message
        return ProtocolError("expected a JSON object, found %s" % shorten(message))
    except (ValueError, RecursionError) as exc:
        return ProtocolError("body is no JSON in UTF-8: %s" % shorten(str(exc)))


def _parse_int(digits):
    """Return the int of JSON's digits, ValueError for too many.

    int() of a million digits takes seconds, in which no other thread runs.
    """
    if len(digits) > 100:
        raise ValueError("a number of %d digits" % len(digits))
    return int(digits)


def check_request(request):
    """Return the Command that the dict `request` names; ProtocolError says what is wrong."""
    name = request.get("command")
    command = next((each for each in COMMANDS if each.name == name), None)
    if command is None:
        raise ProtocolError("unknown command %s, expected one of %s"
                            % (shorten(name), ", ".join(each.name for each in COMMANDS)))
    for field, (kind, is_required) in command.fields.items():
        value = request.get(field)
        if (is_required or value is not None) and type(value) is not kind:
            raise ProtocolError("%s: field %r is %s, expected %s"
                                % (name, field, shorten(value), kind.__name__))
    return command


class MarkDecoder:
    """Split the bytes of a REPL channel into data and marks; the same on both ends.

    `feed` returns a list of (kind, bytes):
        "data"       text, with each doubled 0xFF made one
        "turn", "eof", "interrupt", "timing", "no echo"     a mark; no bytes
        "block"      what stood between BEGIN and END
        "overlong"   a block over the limit, which was dropped; no bytes
    Other telnet negotiation is swallowed.
    """

    MARK = Lazy(lambda: re.compile(   # the first that fits
        rb"(?P<data>(?:[^\xff]+|\xff\xff)+)"
        rb"|(?P<unfinished>\xff[\xfb-\xfe]?\Z)"
        rb"|(?P<begin>\xff\xfa)"
        # WILL, WONT, DO, DONT with an option that telnet clients know: else it is UTF-16 or Latin-1
        rb"|(?P<option>\xff(?:[\xfb-\xfe][\0-\x08\x0e-\x1f]|[\xfb\xfc][\x20-\x27]))"
        rb"|(?P<command>\xff[\xec\xf0-\xfa])"
        rb"|(?P<stray>\xff)"))    # no telnet: a byte that is no text
    NAMES = {GO_AHEAD: "turn", END_OF_FILE: "eof", INTERRUPT: "interrupt", NO_ECHO: "no echo",
             b"\xff\xfd\x06": "timing"}  # DO TIMING-MARK (RFC 860): telnet waits

    def __init__(self, limit_bytes=INPUT_LIMIT_BYTES):
        self._limit_bytes = limit_bytes
        self._rest = b""          # the beginning of a mark whose end has not come yet
        self._block = None        # bytearray of the block that is being received
        self._is_dropping = False  # that block is over the limit

    def feed(self, data):
        """Return what `data` completes, in order."""
        if data and data.find(IAC) < 0 and not self._rest and self._block is None:    # mostly
            return [("data", data)]
        events, at = [], 0
        data, self._rest = self._rest + data, b""
        while at < len(data):
            take = self._take_plain if self._block is None else self._take_block
            at = take(data, at, events)
        return events

    # Each of these takes what stands in `data` at `at`, and returns where the rest begins.

    def _take_plain(self, data, at, events):
        """Outside of a block: text as far as it goes, or one mark."""
        found = self.MARK.match(data, at)
        kind, mark = found.lastgroup, found.group()
        if kind == "unfinished":
            self._rest = data[at:]
            return len(data)
        if kind in ("data", "stray"):
            events.append(("data", mark.replace(IAC + IAC, IAC)))
        elif kind == "begin":
            self._block, self._is_dropping = bytearray(), False
        elif mark in self.NAMES:
            events.append((self.NAMES[mark], b""))
        return found.end()

    def _take_block(self, data, at, events):
        """Within a block: all up to its end, or what has come of it."""
        found = data.find(END, at)
        # The last byte may be the first of END: keep it for the next time.
        end = found if found >= 0 else len(data) - 1
        self._block += data[at:end]
        if len(self._block) > self._limit_bytes:
            self._block, self._is_dropping = bytearray(), True
        if found < 0:
            self._rest = data[end:]
            return len(data)
        events.append(("overlong", b"") if self._is_dropping else ("block", bytes(self._block)))
        self._block = None
        return found + len(END)


class InputDecoder:
    """What a user sends to a session, out of the bytes of its REPL channel.

    Its session's thread feeds it and takes from it. `ready` is a deque of (kind, text):
        "line", "block"              what was typed, without the line's end
        "eof", "interrupt", "timing"      a mark; no text. After `close` "eof" is the last.
        "invalid"                    what was wrong with an input that was dropped
    """

    def __init__(self, limit_bytes=INPUT_LIMIT_BYTES):
        self.ready = collections.deque()  # (kind, text), the oldest first
        self.secret = b""         # of the session, if its client sent one; the first counts
        self.asks_for_control = False     # the client wants to be told where the control channel is
        self._limit_bytes = limit_bytes
        self._marks = MarkDecoder(limit_bytes)
        self._begun = []          # pieces of a line without its end; none of one over the limit
        self._length = 0          # of these, in bytes

    def feed(self, data):
        """Take `data` apart; what it completes is appended to `ready`."""
        for kind, payload in self._marks.feed(data):
            if kind == "data":
                self._take_lines(payload)
            elif kind == "block":
                self._take_block(payload)
            elif kind == "overlong":
                self._refuse("block")
            # The other kinds are what only a server says.
            elif kind in ("eof", "interrupt", "timing"):
                self.ready.append((kind, ""))

    def close(self):
        """End the stream: a last line without a newline counts, then it is end-of-file."""
        if self._length:
            self._take_lines(b"\n")
        self.ready.append(("eof", ""))

    def _take_lines(self, data):
        *lines, begun = data.split(b"\n")
        for line in lines:
            length = len(line)
            if self._length or line.startswith(CTRL_D):
                self._begin_line(line)
                line, length = b"".join(self._begun), self._length
                self._begun, self._length = [], 0
            if length > self._limit_bytes:
                self._refuse("line")
            else:
                self._append_text("line", line[:-1] if line.endswith(b"\r") else line)
        if begun:
            self._begin_line(begun)

    def _begin_line(self, piece):
        """Append bytes to the line that is being received; Ctrl+D at its start is end-of-file."""
        while piece.startswith(CTRL_D) and not (self._length or self.secret):
            self.ready.append(("eof", ""))
            piece = piece[1:]
        self._length += len(piece)
        if self._length <= self._limit_bytes:
            self._begun.append(piece)
        else:
            self._begun = []

    def _take_block(self, payload):
        # Kinds that are not named here are for later versions.
        if payload[:1] == BLOCK_KIND:
            self._append_text("block", payload[1:])
        elif payload[:1] == SECRET_KIND:
            self.secret = self.secret or payload[1:]
        elif payload == CONTROL_KIND:
            self.asks_for_control = True

    def _append_text(self, kind, data):
        """Have an input ready, if it is text."""
        try:
            self.ready.append((kind, data.decode("utf-8")))
        except UnicodeDecodeError as exc:
            self.ready.append(("invalid", "input is no UTF-8: %s; nothing was run" % exc.reason))

    def _refuse(self, what):
        self.ready.append(("invalid", "a %s of over %d bytes was dropped; send less at once"
                           % (what, self._limit_bytes)))


# === 4. Thread streams =======================================================
# Each thread prints to its own session; a thread that has none prints where it always did.
# Three rooms: what stands in sys, os and getpass while a session is open; a session's own streams
# and the Flusher; and Followers, who see what the program's threads print.
#     print() in a session     -> stand-in -> TextIOWrapper -> SessionStream -> Connection
#     print() in other threads -> stand-in -> the stream that sys had before
# A stand-in is a threading.local, because print() then finds the right `write` by a lookup
# in C: for a thread of the program that is its own stream's method, and nothing of ours runs. A
# session's stream is io.TextIOWrapper, also C; Python runs once for each CHUNK_BYTES. What
# is printed less often than that is sent by the Flusher, one thread in a process.
#
#     a session's thread begins   ROUTER.bind(its streams): a stand-in goes into each of PLACES that
#                                 has none, and the thread's slots of the stand-ins are filled
#     before each input           ROUTER.is_bound? if the program has set sys.stdout since: bind
#     the last session ends       ROUTER.release: what the stand-ins stood for is in its place again

STREAM_NAMES = ("stdin", "stdout", "stderr")
_of_sys = vars(sys).get           # names may be deleted from it
_here = threading.local()         # .evaluator: the one whose thread this is


def current_evaluator():
    """Return the Evaluator whose thread this is, or None in a thread of the program's."""
    return getattr(_here, "evaluator", None)


def current_session():
    """Return the session whose thread this is, or None in a thread of the program's."""
    evaluator = current_evaluator()
    return None if evaluator is None else evaluator.session


class StandIn:
    """What takes the place of something in `sys` or `os`; `default` is what it stands for.

    A second copy of this file in the process may put its own in front of ours or take ours off,
    and be another version. So it asks for the two names below, which must stay as they are.
    """

    is_thread_stream = True

    @property
    def is_retired(self):
        """True once no session uses it: then the program has put it back after its time.

        As contextlib.redirect_stdout does that began with a session and ends after it.
        """
        return self not in list(ROUTER.ours.values())


class ThreadStream(threading.local, StandIn):
    """Stand for a sys stream; every attribute is that of the calling thread's own, its `target`.

    Each thread has a __dict__ of its own here, as of any threading.local: its slots. In them are
    `target`, `default` and the three methods that print() and input() look up. All else that text
    files have is a property, made by _forward: a __getattr__ makes print() half as slow again.
    """

    _FAST = ("write", "flush", "readline")
    _OWN = _FAST + ("target", "default")

    def __init__(self, default):
        self._use(default)["default"] = default        # runs in each thread

    def _use(self, stream):
        """Let `stream` be the calling thread's own; return the thread's slots."""
        slots = self.__dict__
        slots["target"] = stream
        for name in self._FAST:
            method = getattr(_Nowhere if stream is None else stream, name, None)
            if method is not None:
                slots[name] = method
        return slots

    def __setattr__(self, name, value):
        setattr(self.target, name, value)
        _forward(name)

    def writelines(self, lines):
        """As io's, but by the thread's own `write`: a session's is watched, another's followed.

        A program's stream that has another writelines() keeps that.
        """
        own = getattr(type(self.target), "writelines", io.IOBase.writelines)
        if own is not io.IOBase.writelines:
            return self.target.writelines(lines)
        for line in lines:
            self.write(line)


class _Nowhere:
    """For a thread whose own stream is None: takes what is printed and drops it, as print() does.
    """

    write, flush = len, int


class OddThreadStream(ThreadStream):
    """Stand for a stream that is no plain text file, or has more attributes than those."""

    def __getattr__(self, name):
        return getattr(self.__dict__["target"], name)


def _forward(name):
    """Let each ThreadStream's attribute `name` be that of its target: a method, or a property."""
    if name in ("__iter__", "__next__", "__enter__", "__exit__", "__repr__"):
        setattr(ThreadStream, name, lambda self, *args: getattr(self.target, name)(*args))
    elif not (name.startswith("__") or name in ThreadStream._OWN or hasattr(ThreadStream, name)):
        setattr(ThreadStream, name, property(
            lambda self: getattr(self.target, name),
            lambda self, value: setattr(self.target, name, value),
            lambda self: delattr(self.target, name)))


io.TextIOBase.register(ThreadStream)
_TEXT_NAMES = {"mode", *dir(io.TextIOWrapper)}
for _name in _TEXT_NAMES:
    _forward(_name)


def thread_stream(default):
    """Return a stand-in for the stream `default`, which may be None."""
    is_plain = type(default) is io.TextIOWrapper and _TEXT_NAMES.issuperset(dir(default))
    return (ThreadStream if is_plain else OddThreadStream)(default)


class ThreadFunction(StandIn):
    """Stand for a function: in a session's thread `own(evaluator, default, ...)` is called instead.
    """

    def __init__(self, default, own):
        self.default = default
        self._own = own

    def __call__(self, *args, **options):
        evaluator = current_evaluator()
        if evaluator is None:
            return self.default(*args, **options)
        return self._own(evaluator, self.default, *args, **options)


def _displayhook(evaluator, default, value):
    """The session displays the value, unless the program has put a hook of its own in sys."""
    if _is_of_program(default, sys.__displayhook__):
        default(value)
    else:
        evaluator.display(value)


def _is_of_program(hook, plain):
    """Return whether a hook in sys is the program's own, and none of a notebook, which would show
    the session's values to the notebook's user.
    """
    owner = type(getattr(hook, "__self__", hook))
    return hook is not plain and not owner.__module__.startswith(("IPython.", "ipykernel."))


def _terminal_size(evaluator, default, *args):
    """A session's is that of its client; shutil and rich ask for it."""
    session = evaluator.session
    return os.terminal_size(session.terminal_size) if session.terminal_size else default(*args)


def _getpass(evaluator, default, prompt="Password: ", *args, **options):
    """The client is asked, not /dev/tty."""
    return evaluator.ask_secret(prompt)


def _end_process(evaluator, default, *args, **options):
    """What a session printed goes out before the process ends, or is replaced."""
    evaluator.push_out()
    return default(*args, **options)


def _system(evaluator, default, command):
    """A session is told, once, where what the child prints goes."""
    evaluator.hint_at_children()
    return _end_process(evaluator, default, command)


RESEND_S = 0.01


def _unraisablehook(evaluator, default, unraisable):
    """An interrupt is sent once more that Python drops: one that arrives in a destructor, or in the
    callback of a weak reference. It is sent a moment later, when this call is over: by then the
    destructor is, too.
    """
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        return default(unraisable)
    session = evaluator.session
    timer = threading.Timer(RESEND_S, session.interrupt, (session.turn, True))
    timer.daemon = True
    timer.start()


class Installed:
    """What is put into the process while somebody uses it, and taken out after the last use.

    It is there from the first `acquire` to the last `release`, from any threads. A subclass says
    by `_install` and `_uninstall`, which run under the lock, how it gets in and out:
        StreamRouter     the stand-ins in sys, os and getpass       used by open sessions
        Followers        logging's record factory, a teed `write`   used by follow()
        MainThread       the handler of SIGURG (section 7)          used by servers that run
        ShortTurns       a shorter sys.setswitchinterval (11)       while we import, or accept
        Debuggers        the adapted pdb (11)                       used by open sessions
        Registry         the atexit callback (13)                   used by servers that run
    """

    ALL = []                      # one of each kind; a forked child lets go of them all

    def __init__(self):
        self._lock = threading.Lock()
        self._users = 0           # guarded by _lock
        self.ALL.append(self)

    def acquire(self):
        """Begin to use it; each call wants one `release`."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._install()

    def release(self):
        """Undo one `acquire`."""
        with self._lock:
            self._users -= 1
            if not self._users:
                self._uninstall()

    def _install(self):
        """Put it in; nothing where each user does so: StreamRouter.bind, MainThread.acquire."""

    def __enter__(self):
        self.acquire()

    def __exit__(self, *exc_info):
        self.release()

    def forget(self):
        """In a forked child, where no session is: take it out without waiting for locks."""
        self._lock = threading.Lock()
        if self._users:
            self._users = 0
            self._uninstall()


class StreamRouter(Installed):
    """The stand-ins of this process, used by open sessions."""

    PLACES = (                    # (module, name in it, what a session does then; None: a stream)
        ("sys", "stdin", None), ("sys", "stdout", None), ("sys", "stderr", None),
        ("sys", "displayhook", _displayhook), ("os", "get_terminal_size", _terminal_size),
        ("getpass", "getpass", _getpass), ("os", "_exit", _end_process),
        ("os", "abort", _end_process), ("os", "execv", _end_process),
        ("os", "execve", _end_process), ("os", "system", _system),
        *([("sys", "unraisablehook", _unraisablehook)] if sys.version_info >= (3, 8) else []))

    def __init__(self):
        super().__init__()
        # Name in its module -> our stand-in there; replaced as a whole, guarded by _lock.
        self.ours = {}
        # (name, id of what it stands for) -> stand-in, the newest last; guarded by _lock. One that
        # no session uses any more is kept for a while: the next session takes it again, and a
        # print() that is just using it holds no reference of its own, and would crash.
        self._made = {}

    def bind(self, streams, bound):
        """Give the calling thread `streams`, a dict of name -> stream, behind sys's stand-ins.

        Return these, as is_bound() wants them; `bound` is what this thread had last. Also puts
        back in front a stand-in that the program has replaced since: its new stream is then what
        the other threads print to.
        """
        with self._lock:
            if self._users and not self.is_bound(bound):
                self._put_in()
            for name in STREAM_NAMES:
                if name in self.ours:
                    streams[name].bind(self.ours[name])
            return tuple(map(self.ours.get, ("stdin", "stdout", "stderr", "displayhook")))

    def unbind(self):
        """Have the calling thread print where the program does."""
        made = [(name, each) for (name, _), each in list(self._made.items())]
        for name, each in made + list(self.ours.items()):
            if name in STREAM_NAMES:
                each._use(each.default)

    @contextmanager
    def lent(self, evaluator, make_stream):
        """Within this the calling thread is one of `evaluator`'s, which may be None, and has
        `make_stream(name, its own stream)` in sys.

        No lock is taken: it may run in a signal handler.
        """
        before, _here.evaluator = current_evaluator(), evaluator
        # With its `write`: a session's, where the thread runs a loop, may be armed for the Flusher.
        lent = [(each, dict(each.__dict__), name) for name, each in list(self.ours.items())
                if name in STREAM_NAMES]
        for each, slots, name in lent:
            each._use(make_stream(name, slots["target"]))
        try:
            yield
        finally:
            for each, slots, name in lent:
                each.__dict__.update(slots)
            _here.evaluator = before

    def is_bound(self, bound):
        """Return whether sys has still what `bind` has returned; waits for nobody."""
        stdin, stdout, stderr, displayhook = bound
        try:
            return (sys.stdout is stdout and sys.stderr is stderr and sys.stdin is stdin
                    and sys.displayhook is displayhook)
        except AttributeError:
            # The program has deleted one.
            return False

    def shows_values(self, bound):
        """Return whether no displayhook of the program's wants to see a session's values."""
        return self.is_bound(bound) and sys.displayhook.default is sys.__displayhook__

    def original(self, name):
        """Return what sys.`name` is to the threads of the program."""
        return _chain(sys, name)[-1]

    def _put_in(self):
        """Put a stand-in before whatever is in each place now, unless one of ours is there."""
        missing = {}
        for module, name, own in self.PLACES:
            module = __import__(module)
            chain = _chain(module, name)
            value = chain[0]
            if self.ours.get(name) not in chain[:-1]:
                each = self._made.pop((name, id(value)), None) or (
                    ThreadFunction(value, own) if own else thread_stream(value))
                self._made[name, id(value)] = missing[name] = each
                if len(self._made) > 256:
                    del self._made[next(iter(self._made))]
                setattr(module, name, each)
        if missing:
            self.ours = dict(self.ours, **missing)

    def _uninstall(self):
        self.ours = {}
        for module, name, _ in self.PLACES:
            module = sys.modules.get(module)
            if module is not None:
                setattr(module, name, _chain(module, name)[0])
        FLUSHER.stop()


def _chain(module, name):
    """Return in a list what `module` has under `name`, what that stands for, and so on; the last is
    no stand-in, neither of ours nor of another copy. Those that somebody put back too late are left
    out. Where the name was deleted, what it had at first counts.
    """
    chain = [getattr(module, name if hasattr(module, name) else "__%s__" % name, None)]
    while getattr(type(chain[-1]), "is_thread_stream", False):
        chain.append(chain[-1].default)
    while len(chain) > 1 and chain[0].is_retired:
        del chain[0]
    return chain


# --- A session's own streams ---
# What stands behind the stand-ins in the thread of a session, which alone writes to them; the
# Flusher visits stdout while an evaluation prints.
#     print() -> TextIOWrapper, `text` -> SessionStream.write, whole chunks -> `sink`.send
# The sink is the session's Connection; once Ctrl+Z has made the evaluation a job, its JobOutput.

class OfSession:
    """What the streams of a session have in common."""

    closed = False                # io's is a property, which each print() would ask twice

    def isatty(self):
        session = current_session()
        return session is not None and session.terminal_size is not None

    def fileno(self):
        raise io.UnsupportedOperation(
            "a session's %s has no descriptor that a process or faulthandler could use; "
            "subprocess.getoutput() and stacks() show theirs here" % self.name.strip("<>"))

    def close(self):
        """Do nothing: site's exit() closes sys.stdin, and only the session is to end."""


class SessionStream(OfSession, io.BufferedIOBase):
    """The bytes end of a session's stdout or stderr: encoded text comes in, `sink` takes it on.

    `text` is the text stream over it. The thread that prints is the session's own; the Flusher
    may flush meanwhile. `sink.send(data)` blocks while the client is slow; `sink.tick(flush)`
    calls `flush` and sends what it can without blocking.
        stdout   the first write of an evaluation (`_write_first`) has the Flusher watch it; the
                 next ones run in C; the end of the evaluation sends the rest (`rearm`)
        stderr   each write is sent at once, behind what was printed to stdout (`earlier`)
    """

    def __init__(self, kind, sink, guard, flusher=None, earlier=None):
        super().__init__()
        self.kind = kind          # "stdout" or "stderr", "value" or "traceback" for a while
        self.name = "<%s>" % kind
        self.sink = sink          # replaced when an evaluation goes to the background
        self._guard = guard       # Interrupts of the thread that prints
        self._flusher = flusher   # None: send at each write
        self.count = 0            # bytes so far
        self._earlier = earlier   # a stream whose text goes out before ours
        self._slots = None        # our thread's slots of the stand-in: print() finds `write` there
        self._is_watched = False  # the Flusher visits it; set by the thread that prints
        self.text = io.TextIOWrapper(self, "utf-8", "strict" if flusher else "backslashreplace",
                                     newline="\n", write_through=flusher is None)
        self.text._CHUNK_SIZE = CHUNK_BYTES

    def bind(self, stand_in):
        """Be what `stand_in` stands for in the calling thread."""
        self._slots = stand_in._use(self.text)
        if self._flusher is not None and not self._is_watched:
            self._slots["write"] = self._write_first

    def rearm(self):
        """Stop the Flusher's visits until the next text is printed."""
        if self._is_watched:
            self._is_watched = False
            self._flusher.unwatch(self)
            self._slots["write"] = self._write_first

    def _write_first(self, text):
        self._check_peer()
        self._is_watched = True
        self._guard.shield(self._flusher.watch, self)
        # From here on print() runs in C.
        self._slots["write"] = self.text.write
        return self.text.write(text)

    def tick(self):
        """Send what was printed so far, as far as that does not block; called by the Flusher."""
        text = self.text
        # None: the session has ended just now.
        if text is not None:
            self.sink.tick(text.flush)
        if self.sink.is_broken:
            # The next print() is to raise BrokenPipeError.
            self._slots["write"] = self._write_first

    def release(self):
        """At the session's end: hold nothing that holds us, so that all goes at once."""
        if self._flusher is not None:
            self._flusher.unwatch(self)
        self.text = self._earlier = None

    def write(self, data):
        if self._earlier is not None:
            self._earlier.text.flush()
        self.count += len(data)
        if threading.get_ident() == self._guard.ident:
            self._guard.shield(self._send, bytes(data))
            self._check_peer()
        else:
            self._send(bytes(data))
        return len(data)

    def _send(self, data):
        # While we wait for the lock, Ctrl+Z may put another sink in the place of this one.
        with self.sink.lock:
            self.sink.send(data, self.kind)

    def _check_peer(self):
        """Raise BrokenPipeError in an evaluation that prints for a client that is gone.

        As a pipe does, so that a loop ends. What we print after the evaluation raises nothing.
        """
        if self.sink.is_broken and self._guard.is_open():
            raise BrokenPipeError(errno.EPIPE, "the session's client is gone")

    def write_as(self, kind, write, text):
        """Call `write(text)`; what arrives here meanwhile is of another kind than ours."""
        if not getattr(self.sink, "has_streams", False):
            return write(text)
        own = self.kind
        self._guard.shield(self._set_kind, kind)
        try:
            write(text)
        finally:
            self._guard.shield(self._set_kind, own)

    def _set_kind(self, kind):
        with self.sink.lock:
            # The Flusher is not at it now.
            self.text.flush()
            self.kind = kind

    def writable(self):
        return True


class SessionInput(OfSession, io.TextIOBase):
    """A session's stdin: each line is asked from its client.

    `ask()` blocks and returns one line with its newline, or "" at end-of-file.
    """

    encoding, errors, mode, name = "utf-8", "strict", "r", "<stdin>"

    def __init__(self, ask):
        super().__init__()
        self._ask = ask
        self._rest = ""           # of a line that was read in parts

    def bind(self, stand_in):
        """Be what `stand_in` stands for in the calling thread."""
        stand_in._use(self)

    def release(self):
        """At the session's end: hold nothing that holds us; from now on it is end-of-file."""
        # Called, it returns "".
        self._ask = str

    def readable(self):
        return True

    def readline(self, size=-1):
        line, self._rest = self._rest or self._ask(), ""
        if size is not None and 0 <= size < len(line):
            line, self._rest = line[:size], line[size:]
        return line

    def read(self, size=-1):
        if size is not None and size >= 0:
            return self.readline(size)
        return "".join(iter(self.readline, ""))


class Flusher:
    """Send what was printed and not sent, a moment later: one thread, asleep when nobody prints.

    A stream is watched from its first write in an evaluation to the evaluation's end.
    """

    def __init__(self):
        self._watched = set()     # streams to visit at each tick
        self._lock = threading.Lock()     # guards _thread
        self._wake = Wake()
        self._thread = None

    def watch(self, stream):
        """Begin to call `stream.tick()` every FLUSH_INTERVAL_S; from any thread, does not block."""
        self._watched.add(stream)
        if self._thread is None:
            self._start()
        self._wake.set()

    def unwatch(self, stream):
        """Stop visiting `stream`."""
        self._watched.discard(stream)

    def stop(self):
        """End the thread; the next `watch` starts another."""
        with self._lock:
            thread, self._thread = self._thread, None
        self._wake.set()
        if thread is not None:
            thread.join(STOP_TIMEOUT_S)

    def forget(self):
        """In a forked child: the thread is gone."""
        self.__init__()

    def _start(self):
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hotrepl flusher",
                                                daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:
                    # No more threads, or the program is ending; the next write tries again.
                    # The next write tries again; what is printed goes out at the evaluation's end.
                    self._thread = None

    def _run(self):
        me = threading.current_thread()
        while self._thread is me:
            self._wake.wait()
            while self._watched:
                time.sleep(FLUSH_INTERVAL_S)
                for stream in list(self._watched):
                    stream.tick()


class Wake:
    """Wakes the thread that waits; `set` while it does not wait counts for its next `wait`.

    A bare lock: a signal handler may call `set` in the middle of another `set`.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self):
        """Wake it; from any thread, and in a signal handler."""
        with suppress(RuntimeError):
            # It is set already.
            self._lock.release()

    def wait(self):
        """Wait for the next `set`, or since the last one."""
        self._lock.acquire()


# --- Followers ---
# They carry text from threads that must never wait to one that may: no lock but bare
# ones, since the writer may be a signal handler in the middle of another write, and no more text
# than BACKLOG_LIMIT characters, since the reader may be as slow as its client.

BACKLOG_LIMIT = 1 << 18


class Backlog:
    """Text that was written and not yet taken, from any thread to one."""

    def __init__(self):
        self._items = collections.deque()     # (stream kind, text)
        self._length = 0          # of all texts, about
        self._dropped = 0         # newlines in what was dropped since the last `take`

    def put(self, kind, text):
        """Append `text`, or count its lines where there is too much already; never blocks."""
        if self._length > BACKLOG_LIMIT:
            self._dropped += text.count("\n")
            return
        self._length += len(text)
        self._items.append((kind, text))

    def take(self):
        """Return what was put since the last time, a list of (stream kind, text)."""
        items = [self._items.popleft() for _ in range(len(self._items))]
        self._length -= sum(len(text) for _, text in items)
        if self._dropped:
            items.append(("stderr", "... %d lines dropped\n" % self._dropped))
            self._dropped = 0
        return items


class Relay(OfSession, io.TextIOBase):
    """A text stream into a Backlog; once `is_open()` is false, into the thread's own stream."""

    encoding, errors, name = "utf-8", "backslashreplace", "<output>"

    def __init__(self, kind, backlog, default, is_open):
        super().__init__()
        self._kind = kind         # "stdout" or "stderr"
        self._backlog = backlog
        self._default = default   # the stream of the thread that prints here for a while
        self._is_open = is_open

    def write(self, text):
        if not self._is_open():
            return self._default.write(text)
        self._backlog.put(self._kind, text)
        return len(text)

    def writable(self):
        return True


class Follower:
    """Passes on what the program's threads print and log, in whole lines, by a thread of its own.

    `send(text)` may block. Of a line that was drawn again and again (a progress bar) the last
    state counts.
    """

    def __init__(self, evaluator, send):
        self.evaluator = evaluator        # whose log records are not passed on to itself
        self._send = send
        self._backlog = Backlog()
        self._begun = {}          # thread ident -> the line that it has not ended yet
        self._wake = Wake()       # there is something to send
        self._is_open = True
        threading.Thread(target=self._run, name="hotrepl follower", daemon=True).start()

    def note(self, text):
        """Take what the calling thread has written; never blocks."""
        ident = threading.get_ident()
        head, newline, rest = (self._begun.pop(ident, "") + text).rpartition("\n")
        if rest:
            self._begun[ident] = rest[-BACKLOG_LIMIT:]
        if newline:
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in head.split("\n")]
            self._backlog.put("stdout", "\n".join(lines) + "\n")
            self._wake.set()

    def close(self):
        """Send nothing more; from any thread."""
        self._is_open = False
        self._wake.set()

    def _run(self):
        while True:
            self._wake.wait()
            if not self._is_open:
                return
            time.sleep(FLUSH_INTERVAL_S)
            text = "".join(text for _, text in self._backlog.take())
            if text:
                self._send(text)


class Followers(Installed):
    """The Followers of this process, and what they need of it while there are any.

    Printed text is seen by the stand-ins: a property of the class comes before what a thread's
    slots hold, so it works for all threads at once, and costs nothing once it is gone. Log records
    are seen where they are made: a handler of the root logger would change what the program does,
    since logging.lastResort and basicConfig() look whether there is one.
    """

    def __init__(self):
        super().__init__()
        self._all = ()            # replaced as a whole
        self._make_record = None  # logging's record factory before ours

    def add(self, follower):
        """Let `follower` see all that is printed and logged from now on."""
        self.acquire()
        self._all += (follower,)

    def remove(self, follower):
        """Undo `add`."""
        self._all = tuple(each for each in self._all if each is not follower)
        self.release()
        follower.close()

    def _install(self):
        import logging
        ThreadStream.write = property(self._teed_write)
        self._make_record = logging.getLogRecordFactory()
        logging.setLogRecordFactory(self._on_record)

    def _uninstall(self):
        import logging
        self._all = ()
        del ThreadStream.write
        if logging.getLogRecordFactory() == self._on_record:
            logging.setLogRecordFactory(self._make_record)

    def _teed_write(self, stand_in):
        """Return what print() is to call in a thread: its own `write`, and then we note the text.
        """
        write = stand_in.__dict__["write"]
        if current_evaluator() is not None:
            return write

        def teed(text):
            written = write(text)
            # None: the interpreter prints what it dies of.
            caller = sys._getframe().f_back
            # What logging's handlers write has come by its record already.
            if caller is None or caller.f_globals.get("__name__") != "logging":
                self._note(text)
            return written
        return teed

    def _on_record(self, name, *args, **kwargs):
        import logging
        record = self._make_record(name, *args, **kwargs)
        if name is not None:
            # Without a name it is makeLogRecord()'s, which fills it in later.
            with suppress(Exception):
                # Where arguments don't fit, the program's own handlers say so.
                self._note(logging.Formatter(logging.BASIC_FORMAT).format(record) + "\n")
        return record

    def _note(self, text):
        own = current_evaluator()
        for each in self._all:
            if each.evaluator is not own:
                each.note(text)


FLUSHER = Flusher()
ROUTER = StreamRouter()
FOLLOWERS = Followers()


# === 5. Interrupts ===========================================================
# KeyboardInterrupt in another thread, at no wrong moment. An asynchronous exception lands
# between any two bytecodes, also in a handler or after the evaluation it was meant for. So each
# thread that evaluates owns an Interrupts, and what becomes of a request depends on its state:
#
#     state    the owner                             a request is        and what was sent is
#     CLOSED   has no input, or its input is over    dropped             cancelled
#     DUE      has announced that it takes one       kept until OPEN     cancelled
#     OPEN     evaluates the user's code             sent at once        on its way
#     shield   within OPEN, runs a call of ours      kept until its end  arrives first
#
# Requests come from any thread and hold the lock. The owner, for whom speed counts, does not: it
# changes the state first and then looks whether anybody has asked (`_is_asked`), a requester says
# that it asks before it looks at the state. So one of the two notices the other, and where that
# is the owner, it waits for the lock and takes back what was sent.
# Where the owner just runs Python's import machinery, the requester waits for a better moment
# (`_send`): an exception there would leave a lock held without which nobody can import.
#
#     Ctrl+C     -> control thread, KeyboardInterrupt -> Session.interrupt -> request -> _take
#     evaluation -> owner's thread: expect, run(function) -> OPEN -> function -> DUE ... close

PATIENCE_PAUSE_S = 0.0005         # how long an interrupt waits for a better moment each time
IMPORT_PATIENCE_S = 0.5           # how long the end of a session waits for an import to end
ARRIVAL_S = 0.1                   # PyPy: what has not arrived after this is sent again

_ON_THEIR_WAY = {}                # PyPy: ident of a thread -> (exception class, when to send again)


def async_raise(thread, exception=KeyboardInterrupt):
    """Raise the class `exception` in `thread` (a threading.Thread or its ident), asynchronously.

    It arrives when that thread next runs Python code: a blocking call in C returns first.
    ValueError: no such thread. TypeError: not an exception class. Source: CPython's C API,
    PyThreadState_SetAsyncExc; on PyPy `__pypy__.thread._raise_in_thread`.
    """
    if not (isinstance(exception, type) and issubclass(exception, BaseException)):
        raise TypeError("expected an exception class, found %s" % shorten(exception))
    ident = thread.ident if isinstance(thread, threading.Thread) else thread
    if not isinstance(ident, int):
        raise TypeError("expected a thread that was started, or its ident, found %s"
                        % shorten(thread))
    # Another thread may have got the number of one that is over. PyPy finds out who runs by itself.
    has_ended = ident is not thread and not thread.is_alive()
    if has_ended or not IS_PYPY and ident not in sys._current_frames():
        raise ValueError("no thread with ident %d is running" % ident)
    _set_async_exception(ident, exception)


def _set_async_exception(ident, exception):
    """Make `exception` pending in the thread `ident`, or nothing where it is None."""
    if exception is None and not IS_PYPY:
        import ctypes
        exception = ctypes.py_object()    # NULL
    _async_raiser()(ident, exception)


@functools.lru_cache(None)
def _async_raiser():
    """Return the function (ident, exception class) that raises in a thread; found once.

    Each import statement leaves something behind that PyPy's collector calls later, in any thread,
    and an interrupt that lands there is lost.
    """
    if IS_PYPY:
        from __pypy__ import thread
        return thread._raise_in_thread
    import ctypes
    kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)
    return kind(("PyThreadState_SetAsyncExc", ctypes.pythonapi))


def _send(ident, exception, forbidden, is_patient):
    """Raise the class `exception` in the thread `ident`, when that next looks for it.

    Return False, and do nothing, where this is no moment for it: that thread runs a code object of
    the set `forbidden` now, or what `_is_fragile` knows; or it has moved on while we looked.
    """
    if IS_PYPY:
        # 7.3.11 dies of a look at the frames of a thread that is running.
        return _send_on_pypy(ident, exception)
    frame = sys._current_frames().get(ident)
    if frame is None:
        # It has ended.
        return True
    enters, place = _enters(frame.f_code), frame.f_lasti
    if (frame.f_code in forbidden or place in enters
            or _is_fragile(frame, is_patient and exception is SystemExit, is_patient)):
        return False
    # Functions in C alone, which hold the interpreter lock throughout: between two lines of Python
    # that thread could run, and be elsewhere.
    frames = itertools.islice(iter(sys._current_frames, None), 1)
    frames, others = itertools.tee(map(operator.itemgetter(ident), frames))
    found = map(functools.partial(operator.is_, frame), frames)
    if enters:
        places = map(operator.attrgetter("f_lasti"), others)
        found = map(operator.and_, found, map(functools.partial(operator.eq, place), places))
    calls = itertools.compress([(ident, exception)], found)
    try:
        return bool(list(itertools.starmap(_async_raiser(), calls)))
    except KeyError:
        # It has ended just now.
        return True


def _is_fragile(frame, spares_imports, spares_starts):
    """Return whether an exception in `frame` could leave something broken behind in the process.

    The import machinery takes and releases its locks in Python code, and 3.13 looks for exceptions
    only a step later than it seems, maybe on the way out. With `spares_imports` so is a module
    that is being imported: who waits for it would get the half of it. With `spares_starts` so is,
    before 3.12, Thread.start(): the new thread, which has its maker's ident as long as it is in
    `_limbo`, would get the exception, and its maker would wait for ever.
    """
    machinery = "<frozen importlib._bootstrap>"
    if frame.f_code.co_filename == machinery:
        return True
    # 3.13 looks for a module under the lock for all imports.
    name = "_find_and_load" if spares_imports else "_find_spec"
    start = _THREAD_START if spares_starts and threading._limbo else None
    while frame is not None:
        code = frame.f_code
        if code is start or code.co_name == name and code.co_filename == machinery:
            return True
        frame = frame.f_back
    return False


_THREAD_START = threading.Thread.start.__code__ if sys.version_info < (3, 12) else None


@functools.lru_cache(100)
def _enters(code):
    """Return the offsets in code where an exception could leave a `with` open for ever.

    3.14 calls `__enter__` by an instruction which is not yet under the protection of the `with`,
    and behind which it looks for exceptions: of a lock that nobody releases then. That is so at
    this call, and where it is the next such instruction, as one may be seen a step later.
    """
    if sys.version_info < (3, 14) or IS_PYPY:
        return frozenset()
    import dis
    if dis.opmap["LOAD_SPECIAL"] not in code.co_code[::2]:
        return frozenset()
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    at = {step.offset: k for k, step in enumerate(steps)}
    found = set()
    for k, step in enumerate(steps):
        if step.opname == "CALL" and k and steps[k - 1].opname == "LOAD_SPECIAL":
            found.add(step.offset)
            found.update(each.offset for each in steps[_check_before(steps, k):k])
    found.update(step.offset for step in steps if step.opname.startswith("JUMP_BACKWARD")
                 and at.get(step.argval) is not None and steps[at[step.argval]].offset in found)
    return frozenset(found)


def _check_before(steps, k):
    """Return the index of the last instruction before step k that looks for exceptions, or 0."""
    names = ("CALL", "JUMP_BACKWARD", "RESUME")
    return next((i for i in range(k - 1, -1, -1) if steps[i].opname.startswith(names)), 0)


def _send_on_pypy(ident, exception):
    """As `_send`, on PyPy, which says nothing of the moment; True."""
    arrives_s = _ON_THEIR_WAY.get(ident, (None, 0.0))[1]
    if time.monotonic() >= arrives_s:
        exception = _noting_arrival(exception)
        _ON_THEIR_WAY[ident] = exception, time.monotonic() + ARRIVAL_S
        with suppress(ValueError):
            # The thread has ended just now.
            _set_async_exception(ident, exception)
    return True


def _cancel(ident):
    """Take back what `_send` sent, if it has not arrived. PyPy can't: there it arrives here."""
    if not IS_PYPY:
        _set_async_exception(ident, None)
        # Once one was sent, CPython looks for it all the time until one has arrived: that is slow,
        # and 3.11 can't trace a call meanwhile. So we have one of our own arrive, here.
        try:
            _set_async_exception(threading.get_ident(), _Arrival)
            _checkpoint()
        except _Arrival:
            pass
    elif ident == threading.get_ident():
        try:
            while ident in _ON_THEIR_WAY:
                _land(ident)
        except BaseException:
            # That is what has arrived.
            pass


def _free_import_lock():
    """Release the lock for all imports where this thread, which imports nothing now, left it.

    PyPy raises an exception where it likes, also between taking the lock and seeing to its release.
    """
    with suppress(RuntimeError):
        # It is another thread's.
        while _imp.lock_held():
            _imp.release_lock()


class _Arrival(BaseException):
    """What arrives where it was sent from."""


def _checkpoint():
    """Do nothing, in Python: CPython looks for asynchronous exceptions at each call."""


def _land(ident):
    """Have what was sent to this thread arrive now; CPython looks for it at each call, as of this.
    """
    if ident in _ON_THEIR_WAY:
        # PyPy looks for it now and then only, but at once after this.
        _set_async_exception(ident, _ON_THEIR_WAY[ident][0])


@functools.lru_cache(None)
def _noting_arrival(kind):
    """Return what to raise on PyPy for the class `kind`: one of that, noted when it arrives."""
    def __new__(cls, *_):
        _ON_THEIR_WAY.pop(threading.get_ident(), None)
        return kind()
    return type(kind.__name__, (kind,), {"__new__": __new__})


class Interrupts:
    """The door for asynchronous exceptions into one thread; the table above says when it is open.

    The owner calls expect, run, shield and close; any thread `request`.
    """

    CLOSED, DUE, OPEN = range(3)

    def __init__(self):
        self.ident = None         # of the thread that owns this; set once by `adopt`
        self._lock = threading.Lock()
        self._state = self.CLOSED  # written by the owner, as are the next two
        self._is_shielded = False
        self._evaluation = 0      # how many have ended, or were given up by `withdraw`
        self._is_asked = False    # somebody asked since this was reset, under the lock
        self._sent_s = -ARRIVAL_S  # when an exception was sent last; guarded by _lock
        self._kept = collections.deque(maxlen=1)      # an exception class to raise when it is safe

    def adopt(self):
        """Make the calling thread the owner."""
        self.ident = threading.get_ident()

    def is_open(self):
        """Return whether the owner, who asks, evaluates something."""
        return self._state == self.OPEN

    def expect(self):
        """Get ready for an input: from here on a request is for what it evaluates."""
        self._state = self.DUE
        if self._is_asked:
            self._forget()

    def close(self):
        """Turn interrupts off, and forget those that have not arrived; can be repeated."""
        self._state = self.CLOSED
        self._evaluation += 1
        if self._is_asked or self._kept:
            self._forget()

    def request(self, exception=KeyboardInterrupt):
        """Interrupt what the owner evaluates, or is about to; from any thread."""
        # Both import something at their first call, which must not be under our lock: an import
        # waits for the imports of other threads.
        _async_raiser()
        _enters(_checkpoint.__code__)
        with self._lock:
            evaluation, is_done = self._evaluation, self._take(exception)
        if not is_done:
            self._spawn(self._request_later, exception, evaluation)

    def withdraw(self):
        """Take back a request that has not arrived: Ctrl+Z after a Ctrl+C that changed nothing."""
        self._evaluation += 1
        self._forget()

    def run(self, function, *args):
        """Return what `function` returns, called with interrupts on. They are off afterwards."""
        try:
            try:
                self._state = self.OPEN
                if self._kept:
                    self._raise_kept()
                value = function(*args)
                # Not CLOSED: one input can be evaluated in several parts.
                self._state = self.DUE
                if self._is_asked:
                    self._settle()
                return value
            except BaseException:
                self.close()
                raise
        except BaseException:
            # An interrupt can land on the lines above, but not two.
            self.close()
            raise

    def shield(self, function, *args):
        """Call `function` in an evaluation, whole: an interrupt is raised after it, or before."""
        # Nobody but the owner, who is here, changes either of the two.
        if self._is_shielded or self._state != self.OPEN:
            return function(*args)
        try:
            self._is_shielded = True
            if self._is_asked:
                # With the lock, what was being requested has been sent. It lands here at the
                # latest, and even then the call below is made.
                with self._lock:
                    _land(self.ident)
        finally:
            try:
                self._is_shielded = True
                function(*args)
            finally:
                self._is_shielded = False
        if self._kept and self._state == self.OPEN:
            self._raise_kept()
        return None

    def _spawn(self, function, *args):
        threading.Thread(target=function, args=args, name="hotrepl interrupt", daemon=True).start()

    def _request_later(self, exception, evaluation):
        """Interrupt that evaluation at a better moment, in a thread of its own.

        An import can wait long for that of another thread. From IMPORT_PATIENCE_S on, nothing but
        the import machinery itself is waited for.
        """
        is_over, end = False, time.monotonic() + IMPORT_PATIENCE_S
        while not is_over:
            time.sleep(PATIENCE_PAUSE_S)
            with self._lock:
                is_over = (self._evaluation != evaluation
                           or self._take(exception, is_patient=time.monotonic() < end))

    def _take(self, exception, is_patient=True):
        """Send, keep or drop the exception; False: none of these, since it is no moment for it."""
        # Before the look at the state: see the head of the section.
        self._is_asked = True
        if self._state == self.CLOSED:
            return True
        if self._state == self.DUE or self._is_shielded:
            self._kept.append(exception)
            return self._state != self.OPEN or self._is_shielded or self._pop() is None
        if IS_PYPY and time.monotonic() < self._sent_s + ARRIVAL_S:
            # If it is not on its way any more, `run` may be leaving with one: try again.
            return self.ident in _ON_THEIR_WAY
        self._sent_s = time.monotonic()
        is_sent = _send(self.ident, exception, self.OURS, is_patient)
        if IS_PYPY:
            self._spawn(self._send_again, exception, self._evaluation)
        return is_sent

    def _send_again(self, exception, evaluation):
        """PyPy loses one now and then, in a loop that computes: send until it has arrived."""
        is_lost = True
        while is_lost:
            time.sleep(ARRIVAL_S / 10)
            with self._lock:
                is_lost = (self._evaluation == evaluation and self._state == self.OPEN
                           and self.ident in _ON_THEIR_WAY)
                if is_lost:
                    # This does nothing for ARRIVAL_S after the last one.
                    _send_on_pypy(self.ident, exception)

    def _pop(self):
        """Return what was kept, or None where the other side was faster."""
        try:
            return self._kept.pop()
        except IndexError:
            return None

    def _raise_kept(self):
        kept = self._pop()
        if kept is not None:
            raise kept

    def _forget(self):
        """Take back what was sent and has not arrived, or was kept."""
        with self._lock:
            # Whoever was asking has sent it by now.
            self._kept.clear()
            self._cancel()

    def _settle(self):
        """Have what was sent land here: on 3.14 not within a `with` of ours, see _enters."""
        with self._lock:
            self._cancel()

    def _cancel(self):
        self._is_asked, self._sent_s = False, -ARRIVAL_S
        _cancel(self.ident)
        _free_import_lock()

    OURS = {each.__code__ for each in (
        expect, close, run, shield, _pop, _raise_kept, _forget, _settle, _cancel)}


# === 6. Consoles =============================================================
# Two rooms: the console, which compiles and runs what a client sends; and completion.
#
# The first of imacropy, MacroPy, mcpyrate and the standard library that imports and can be
# made is the console of a session. Importing any of the first three changes the import system,
# so a miss is taken back: sys.meta_path, sys.path_hooks and sys.modules are as before.
# All are InteractiveConsole underneath; ConsoleMixin puts our half in front. All of it runs in
# the evaluator's thread. A line goes this way:
#     run_line      a whole expression or statement is compiled at once -> runcode
#                   all else -> push(), as the class has it: it finds out whether more is to
#                   come, expands macros, and calls runcode or showsyntaxerror
#     run_block     any number of statements at once -> runcode; the last one's value is shown
#     runcode       -> Evaluator.run_code, with interrupts on -> showtraceback
#
#     input                       way                                       result
#     1 + 1                       run_line, compiled as "eval"              the value is shown
#     for x in y:                 run_line, push                            wants more
#     names?                      run_line, _answer                         Evaluator.answer
#     a pasted block, exec -c     run_block                                 the last value is shown
#     return 5                    push or run_block, showsyntaxerror        its line and caret

CONSOLES = [                      # (modules to import, class in the last, below which Python)
    (("imacropy.console",), "MacroConsole", (3, 9)),  # later ones import, but expand no macro
    (("macropy.activate", "macropy.core.console"), "MacroConsole", (3, 9)),
    (("mcpyrate.repl.console",), "MacroConsole", (4,)),
]
_MACRO_PACKAGES = ("imacropy", "macropy", "mcpyrate")


def make_console(namespace, evaluator, console_class=None):
    """Return a console for `evaluator` over `namespace`; of `console_class`, or the best there is.

    What making a `console_class` raises is raised here. Of the others, a miss is logged, and the
    next is tried.
    """
    from code import InteractiveConsole
    if console_class is not None:
        return _adapt(console_class)(namespace, evaluator)
    for modules, name, below in CONSOLES:
        tried = modules, tuple(sys.path)
        if sys.version_info < below and tried not in _missed:
            with _import_lock:
                console = _try_console(modules, name, namespace, evaluator)
            if console is not None:
                return console
            _missed.add(tried)
    return _adapt(InteractiveConsole)(namespace, evaluator)


_missed = set()                   # (modules, sys.path) that made no console
_import_lock = threading.RLock()  # one console is tried at a time: a miss takes back its imports


def _try_console(modules, name, namespace, evaluator):
    """Return a console of that class; or None, and what the import has changed is taken back."""
    lists = [(each, list(each)) for each in (sys.meta_path, sys.path_hooks)]
    loaded, streams = set(sys.modules), (sys.stdout, sys.stderr)
    try:
        for module in modules:
            __import__(module)
        return _adapt(getattr(sys.modules[module], name))(namespace, evaluator)
    except Exception as exc:
        # Not ImportError alone: MacroPy may raise TypeError.
        for live, before in lists:
            live[:] = before
        for each in set(sys.modules) - loaded:
            if each.partition(".")[0] in _MACRO_PACKAGES:
                del sys.modules[each]
        log.debug("no console from %s: %s", module, shorten(str(exc)))
        return None
    finally:
        # mcpyrate imports colorama, which wraps them.
        sys.stdout, sys.stderr = streams


def _adapt(base):
    """Return our class over the console class `base`, made once for each.

    Its `own` names what the class has in place of the methods of code's InteractiveConsole.
    """
    if base not in _adapted:
        from code import InteractiveConsole
        own = {name for each in base.__mro__ for name, value in vars(each).items()
               if value is not getattr(InteractiveConsole, name, value)}
        _adapted[base] = type("SessionConsole", (ConsoleMixin, base), {"own": own})
    return _adapted[base]


_adapted = {}                     # class of a console -> ours over it


class ConsoleMixin:
    """What a session adds to a console class; stands before it in the bases."""

    own = frozenset()             # names of methods that the class has in place of code's

    def __init__(self, namespace, evaluator):
        import linecache
        self.evaluator = evaluator
        self._linecache = linecache       # an import statement for each line costs more
        # The file names of the inputs: <hotrepl CONSOLE:INPUT>, each a number.
        self._names = map(("<hotrepl %d:%%d>" % next(_serials)).__mod__, itertools.count(1))
        # What runs now, for its traceback; its last line has an end too: else on 3.11 and 3.12 the
        # marks below it stand one place too far right.
        self.source = ""
        self.filename = ""        # by which linecache knows it
        # After our attributes are set: imacropy's class runs code when it is made.
        super().__init__(namespace)   # type: ignore[call-arg]
        from codeop import CommandCompiler
        compiler = getattr(self, "compile")
        self._has_plain_compiler = type(compiler) is CommandCompiler
        # No method of the class's own stands between a line and the compiler.
        self._is_plain = (self._has_plain_compiler
                          and self.own.isdisjoint(("push", "runsource", "runcode")))
        compiler.compiler.flags |= ALLOW_AWAIT    # mcpyrate and imacropy take it from there

    def run_line(self, line):
        """Run `line`, or keep it until more come; return whether the console wants more."""
        if self.buffer:
            self._begin(self.filename, "%s%s\n" % (self.source, line))
            return self.push(line)
        self._begin(next(self._names), line + "\n")
        if "?" in line and self._answer(line):
            return False
        code_object = self._compile_whole(line) if self._is_plain else None
        if code_object is None:
            return self.push(line)
        self.runcode(code_object)
        return False

    def run_block(self, source, name=None):
        """Run `source`, any number of statements, as one unit; show the last one's value.

        `name` stands for it in tracebacks, in place of a number.
        """
        source = source.rstrip() + "\n"
        self._begin(name or next(self._names), source)
        if "?" in source and self._answer(source):
            return
        try:
            code_objects = self._compile_block(source)
        except (SyntaxError, ValueError, OverflowError, RecursionError):
            self.showsyntaxerror(self.filename)
            return
        # A class with a way of its own expands macros, or the like, and has to see the source.
        if not self.own.isdisjoint(("runsource", "runcode")):
            before = getattr(self, "compile")
            if self._has_plain_compiler:
                self.compile = _BlockCompiler(before)
            try:
                with self.evaluator.showing_last_value(code_objects[1]):
                    self.runsource(source, self.filename, "single")
            finally:
                self.compile = before
        elif code_objects[0] is None or self.runcode(code_objects[0]):
            if code_objects[1] is not None:
                self.runcode(code_objects[1])

    def _begin(self, filename, source):
        """Let tracebacks, stacks() and pdb find the lines of what runs now, not of the last input.
        """
        cache = self._linecache.cache
        if self.filename not in cache:
            restore_sources()
        elif self.filename not in _remembered:
            # No function has come from the last input, so nobody needs its lines.
            cache.pop(self.filename, None)
        self.filename, self.source = filename, source
        if source:
            cache[filename] = _lines_entry(filename, source)

    def forget(self):
        """Let go of the lines of the last input."""
        self._begin("", "")

    def _compile_whole(self, line):
        """Return the code of a line that is complete and right; None: the console has to see it.

        CommandCompiler, as which the console knows incomplete and wrong input, compiles up to
        three times; what is complete and right takes one. Of an expression ("eval") the value is
        shown when all is over; "single" would display it within the evaluation, which is slower,
        and only done where the line is or may be a statement.
        """
        is_statement = "=" in line or line.partition(" ")[0] in _STATEMENT_WORDS
        if "__future__" in line:
            # The console's compiler has to see it, as it remembers what is imported.
            return None
        try:
            return compile(line, self.filename, "single" if is_statement else "eval",
                           self.compile.compiler.flags, True)
        except (SyntaxError, ValueError, OverflowError):
            return None

    def _compile_block(self, source):
        """Return the code of all but a last expression, and of that; either may be None."""
        import ast
        flags = self.compile.compiler.flags & ~_INTERACTIVE_FLAGS
        tree = compile(source, self.filename, "exec", flags | ast.PyCF_ONLY_AST, True)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
            last = compile(last, self.filename, "eval", flags, True)
        body = compile(tree, self.filename, "exec", flags, True) if tree.body else None
        return body, last

    def runsource(self, source, filename="<input>", symbol="single"):
        """As InteractiveInterpreter's, with a space behind a question mark at the end.

        mcpyrate takes each line that ends in one for a question, also `x = 1  # why?`.
        """
        if source.endswith("?") and source.strip() != "macros?":
            source += " "
        return bool(super().runsource(source, filename, symbol))

    def runcode(self, code_object):
        """Run `code_object`, and show what it raises; return whether it raised nothing.

        SystemExit is not shown but raised: it ends the session.
        """
        runcode = super().runcode if "runcode" in self.own else None
        if types.CodeType in map(type, code_object.co_consts):
            # It has functions or classes, which may outlive this input.
            remember_source(code_object.co_filename, self.source)
        try:
            self.evaluator.run_code(code_object, self.locals, runcode=runcode)
            return True
        except SystemExit:
            raise
        except BaseException:
            self.showtraceback()
            return False

    def showtraceback(self):
        """Show the exception that is being handled, without the frames of this file."""
        _, value, frames = sys.exc_info()
        while frames is not None and _is_plumbing(frames.tb_frame.f_code):
            frames = frames.tb_next
        # 3.12: pdb.pm() begins at the frames of the exception itself.
        BaseException.with_traceback(value, frames)
        is_own = "showtraceback" in self.own
        self.evaluator.show_exception(value, self._show_by_own if is_own else None)

    def _show_by_own(self):
        """Call the class's own showtraceback(), within `except`, where it looks for the exception.

        code's drops the first frame, which is that of its runcode(); here it drops this one.
        """
        value = self.evaluator.result.exception
        frames = value.__traceback__
        try:
            raise value
        except BaseException:
            super().showtraceback()
        finally:
            BaseException.with_traceback(value, frames)

    def showsyntaxerror(self, filename=None, **options):
        """Show the SyntaxError that is being handled, without any frames."""
        value = sys.exc_info()[1]
        if type(value) is SyntaxError and value.text is None and value.filename == self.filename:
            # Errors that the compiler finds, not the parser, have no line: `return 5`.
            line = self.source.split("\n")[(value.lineno or 1) - 1:][:1]
            value.text = line[0] if line else None
        BaseException.with_traceback(value, None)
        is_own = "showsyntaxerror" in self.own
        self.evaluator.show_exception(value, functools.partial(
            super().showsyntaxerror, filename, **options) if is_own else None)

    def raise_in_input(self, exc):
        """Raise `exc`, which showing a value raised, as if the input did: on its first line."""
        import ast
        line = self.source.partition("\n")[0].strip()
        # As long as the line, so that no marks are below that.
        place = {"lineno": 1, "end_lineno": 1, "col_offset": 0, "end_col_offset": len(line)}

        def fail():
            raise exc
        call = ast.Call(ast.Name("fail", ast.Load(), **place), [], [], **place)
        eval(compile(ast.Expression(call), self.filename, "eval"), {"fail": fail})

    def write(self, data):
        """Show what the console class says: by its own way, or on the session's stderr."""
        if "write" in self.own:
            super().write(data)
        else:
            self.evaluator.streams["stderr"].text.write(data)

    def _answer(self, source):
        """Show what `obj?` or `obj??` asks for; return False if `source` is no such question."""
        match = re.match(r"\s*(?!macros\?)([^?#=\n]+?)\s*(\?\??)\s*$", source)
        try:
            code_object = compile(match.group(1), self.filename, "eval") if match else None
        except SyntaxError:
            code_object = None
        if code_object is None:
            return False
        try:
            self.evaluator.answer(code_object, self.locals, match.group(2) == "??")
        except BaseException:
            self.showtraceback()
        return True


_serials = itertools.count(1)
ALLOW_AWAIT = 0x2000 if sys.version_info >= (3, 8) else 0     # ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_INTERACTIVE_FLAGS = 0x200 | 0x4000       # codeop's: don't imply dedent, allow incomplete input
_STATEMENT_WORDS = set(keyword.kwlist) - {"None", "True", "False", "lambda", "not", "await"}
_THIS_FILE = ConsoleMixin.run_line.__code__.co_filename


def _is_our_file(path):
    """Return whether code of that file is ours: this file, or what PyPy runs a context by."""
    return path == _THIS_FILE or IS_PYPY and path.endswith("_contextvars.py")


def _is_plumbing(code_object):
    """Return whether the code runs inputs and is of none: our own, or that of code's runcode()."""
    from code import InteractiveConsole
    return (_is_our_file(code_object.co_filename)
            or code_object is InteractiveConsole.runcode.__code__)


class _BlockCompiler:
    """Takes the place of code's compiler while a block runs; takes any number of statements."""

    def __init__(self, plain):
        self.compiler = plain.compiler

    def __call__(self, source, filename="<input>", symbol="single"):
        import ast
        flags = self.compiler.flags & ~_INTERACTIVE_FLAGS
        tree = compile(source, filename, "exec", flags | ast.PyCF_ONLY_AST, True)
        return compile(ast.Interactive(tree.body), filename, symbol, flags, True)


def remember_source(filename, source):
    """Let tracebacks and inspect.getsource find the lines of what was typed; the last 1,000."""
    import linecache
    linecache.cache[filename] = _remembered[filename] = _lines_entry(filename, source)
    if len(_remembered) > 1000:
        linecache.cache.pop(_remembered.popitem(last=False)[0], None)


def restore_sources():
    """Put back what linecache.clearcache() took."""
    import linecache
    linecache.cache.update(_remembered.copy())


def _lines_entry(filename, source):
    """Return what linecache keeps of an input: its size, no time, the lines, the name."""
    return len(source), None, source.splitlines(True), filename


_remembered = collections.OrderedDict()   # file name -> its entry in linecache, the oldest first


# --- Completion: what fits left of the cursor ---
# It looks, and runs nothing: no property, no `__getattr__`, no import, no call; the one exception
# is an object's own `__dir__`. It holds no lock and changes nothing, so the thread that completes
# may be abandoned or interrupted at any bytecode. The text is cut into tokens:
#     f(1, d["a"].up|rest     tokens: \n f ( 1 , d [ "a" ] .     word: up
# What stands before the last "." is found without a call (`_value`), and its attributes are listed.
# `_Cursor.find` decides by the last token:
#     import, from    modules; names in one, from its source where it is not loaded
#     value.          attributes
#     value["         string keys
#     value(          nothing, but a hint: how to call it
#     value(a, na     keyword arguments that are not given yet, then names
#     else            names of the namespace, builtins, keywords
# What can't be told raises, and then nothing is offered. A session's Complete and TabComplete run
# it in a thread of their own, as an object's `__dir__` may never return. Where a `__getitem__`, a
# property or a metaclass of the program's would have to run, LookupError is raised instead.

Completions = record("Completions", "start matches hint")

_TOKEN = r"""(?sx)
    (?P<comment> \#[^\n]* )
  | (?P<string> (?P<prefix>[rbuftRBUFT]{0,2}) (?P<quote>(?P<triple>\"{3}|'{3})|"|')
        (?P<body>(?: \\. | (?!(?P=quote)) (?(triple). | [^\\\n]) )* \\?) (?P<end>(?P=quote))? )
  | (?P<name> [^\W\d]\w* )
  | (?P<number> \d[\w.]* )
  | (?P<space> (?: [^\S\n] | \\\n )+ )
  | (?P<other> [=!<>:]= | . )
"""
_STRING_WITHOUT_WARNING = r"""(?s)[bB]?[rR].*|(?:[^\\]|\\[\\'"abfnrtvxuU\n])*"""
_WORDS_ALONE = "False None True break continue else except finally lambda pass return try yield"
_BEFORE_LIMIT = 20000             # characters of earlier lines that are searched for open brackets
_NAMES_LIMIT = 100000             # an object that lists more than this has an endless `__dir__`


def complete(namespace, line, cursor=None, limit=10000, before="", overlay=None):
    """Return all Completions at `cursor`: any of `matches` can replace `line[start:cursor]`.

    `hint` is how to call the function whose parenthesis was just opened, or None.

    `before` holds the earlier lines of an unfinished input; names in the dict `overlay` hide those
    in `namespace`. Any thread may call; a user's `__dir__` can make it last. Raises no Exception.
    """
    cursor = len(line) if cursor is None else max(0, min(cursor, len(line)))
    if not line[:cursor].rpartition("\n")[2].strip():
        # Here Tab means indentation.
        return Completions(cursor, [], None)
    try:
        text = before.rstrip("\n")[-_BEFORE_LIMIT:] + "\n" + line[:cursor]
        scope = collections.ChainMap(overlay or {}, namespace, vars(builtins))
        place = _Cursor(text, line[cursor:], scope)
        matches, hint = place.find()
        return Completions(cursor - len(place.word), _cut(matches, limit), hint)
    except Exception:
        # Unfinished code and odd objects are the normal case.
        return Completions(cursor, [], None)


def _cut(matches, limit):
    """Return `limit` matches, or as many as a message holds, the first ones and the last.

    readline inserts what all of them begin with, and with the last that is the same as before.
    """
    longest = max(map(len, matches), default=0)
    # In JSON a character takes up to 6 bytes, and a match 4 more. Half a message has to do.
    most = max(1, min(limit, MESSAGE_LIMIT_BYTES // 2 // (6 * longest + 4)))
    if len(matches) <= most:
        return matches
    matches = sorted(matches)
    return matches[:most - 1] + matches[-1:]


class _Cursor:
    """What stands left of the cursor, cut into tokens. `find` returns what fits there.

    An Exception: nothing does, or it can't be told.
    """

    def __init__(self, text, rest, scope):
        self.rest = rest          # the text right of the cursor
        self.scope = scope        # a ChainMap: overlay, namespace, builtins
        self.tokens = ["\n"]      # a line's end, then all left of the word but space and comments
        self.word = ""            # what is to be replaced: a name, or the text of a string ...
        self.quote = self.prefix = ""     # ... with these marks
        # For each open bracket: [its index in tokens, commas behind it, {names given by "="}].
        self.opened = []
        self.first = 1            # index of the first token of the statement
        for found in re.finditer(_TOKEN, text):
            self._add(found.lastgroup, found.group())
        if found.lastgroup == "string" and not found.group("end"):
            self.word, self.quote, self.prefix = found.group("body", "quote", "prefix")
        elif found.lastgroup == "name":
            self.word = found.group()
        if found.lastgroup == "comment" or "\n" in self.word:
            raise LookupError("nothing is completed in a comment or a string of several lines")
        if self.word or self.quote:
            self.tokens.pop()

    def _add(self, kind, token):
        """Append a token, and keep count of open brackets and of where the statement begins."""
        if kind in ("comment", "space") or token == "\n" and self.opened:
            return
        if token in ("(", "[", "{"):
            self.opened.append([len(self.tokens), 0, set()])
        elif token in (")", "]", "}"):
            del self.opened[-1:]
        elif self.opened and token == ",":
            self.opened[-1][1] += 1
        elif self.opened and token == "=":
            self.opened[-1][2].add(self.tokens[-1])
        elif token in ("\n", ";", ":"):
            self.first = len(self.tokens) + 1
        self.tokens.append(token)

    def find(self):
        """The matches and the hint."""
        last, end = self.tokens[-1], len(self.tokens) - 1
        if self.quote:
            return self._in_string(), None
        words = self.tokens[self.first:]
        if words[:1] == ["lazy"]:         # 3.15
            del words[0]
        if words[:1] in (["import"], ["from"]):
            return self._importable(words[0], words[1:]), None
        if last == ".":
            return _select(_attribute_names(self._value(end)), self.word), None
        if not self.word and _ends_operand(last):
            return [], None
        if not self.word and last == "[":
            with suppress(LookupError, ValueError):
                keys = _keys(self._value(end), "")
                return sorted(map(repr, keys)) or self._names(), None
        called = self._called()
        if not self.word and last == "(" and called is not _MISSING:
            return [], _hint(self.tokens[end - 1], called)
        return self._keyword_arguments(called) + self._names(), None

    def _in_string(self):
        """The keys that fit after `d["`, spelled for this kind of string."""
        quote = self.quote
        if self.prefix or self.tokens[-1] != "[":
            return []
        typed = _constant(quote + self.word + quote)
        ending = "" if self.rest.startswith(quote) else quote + "]"
        return sorted(_escape(key, quote) + ending
                      for key in _keys(self._value(len(self.tokens) - 1), typed))

    def _value(self, end):
        """The object named by the tokens before `end`: a dotted name, with constant subscripts."""
        token = self.tokens[end - 1]
        if token == "]":
            sign = -1 if self.tokens[end - 3] == "-" else 1
            begin = end - 3 if sign == 1 else end - 4
            if self.tokens[begin] == "[":
                key = self._atom(self.tokens[end - 2])
                return _item(self._value(begin), -key if sign == -1 else key)
        elif self.tokens[end - 2] == ".":
            return _lookup(self._value(end - 2), token)
        return self._atom(token)

    def _atom(self, token):
        """The object that one token stands for: a name, a string, a number; KeyError, ValueError.
        """
        if token.isidentifier():
            return self.scope[token]
        return _constant(token) if token[-1] in "\"'" else int(token)

    def _importable(self, keyword, given):
        """Modules, or names in one, after an import statement's keyword and the tokens given."""
        if "import" in given:
            module = "".join(given[:given.index("import")])
            fits = given[-1] in ("import", "(", ",")
            return _select(_names_in_module(module), self.word) if fits else []
        package = "".join(given).rpartition(",")[2]
        if package.endswith("."):
            return _select(_submodules(package[:-1]), self.word) if package[0] != "." else []
        if package:
            return ["import "] if keyword == "from" and "import".startswith(self.word) else []
        return _select(_submodules(""), self.word)

    def _called(self):
        """What the innermost open parenthesis calls; _MISSING if it is none or can't be told."""
        end = self.opened[-1][0] if self.opened else 0
        if self.tokens[end] == "(" and self.tokens[end - 2] not in ("def", "class"):
            with suppress(Exception):
                # If it can't be told, the names can be completed all the same.
                called = self._value(end)
                return called if callable(called) else _MISSING
        return _MISSING

    def _keyword_arguments(self, called):
        """`name=` for each keyword that the call can still take, where an argument begins."""
        signature = _signature(called) if self.tokens[-1] in ("(", ",") else None
        if signature is None:
            return []
        _, commas, given = self.opened[-1]
        parameters = list(signature.parameters.values())
        positional = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
        taken = given.union(positional[:commas - len(given)])
        return [p.name + "=" for p in parameters if p.name.startswith(self.word)
                and p.name not in taken and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

    def _names(self):
        """The names and keywords that continue the word; without a word, the user's own names."""
        found = _select(itertools.chain(*self.scope.maps[:3 if self.word else 2]), self.word)
        words = [word if word in _WORDS_ALONE.split() else word + " "
                 for word in keyword.kwlist if self.word and word.startswith(self.word)]
        return sorted(found + [word for word in words if word not in found])


def _ends_operand(token):
    """Whether a subscript, a call or an operator can follow `token`."""
    is_name = token.isidentifier() and not keyword.iskeyword(token)
    return is_name or token[-1] in "\"')]}" or token[0].isdigit()


def _constant(token):
    """The value of a string literal; LookupError for one that the parser would warn of.

    Filters for warnings are the whole process's, so we can't ask for silence.
    """
    import ast
    if not re.fullmatch(_STRING_WITHOUT_WARNING, token):
        raise LookupError("a doubtful escape sequence")
    return ast.literal_eval(token)


def _keys(mapping, typed):
    """The string keys of a dict, or of os.environ, that begin with `typed`; LookupError."""
    if type(mapping) is not type(os.environ):
        if _find(type(mapping), "__getitem__") is not dict.__getitem__:
            raise LookupError("to list this mapping could run code")
        mapping = dict.keys(mapping)
    return [key for key in list(mapping) if type(key) is str and key.startswith(typed)]


def _escape(text, quote):
    """What to write between two `quote` for `text`."""
    # With a '"' in the text, repr uses "'" for its quotes.
    text = repr('"' + text)[2:-1]
    return text if quote == "'" else text.replace("\\'", "'").replace('"', '\\"')


def _item(value, key):
    """`value[key]` of what finds its items as dict, list or tuple do; no `__missing__`."""
    getter = _find(type(value), "__getitem__")
    is_sequence = getter is list.__getitem__ or getter is tuple.__getitem__
    is_dict = getter is dict.__getitem__ and _is_exactly(key, str, bytes, int)
    if is_sequence and type(key) is int or is_dict and dict.__contains__(value, key):
        return getter(value, key)
    raise LookupError("to look this up could run code")


# Descriptors whose `__get__` is the interpreter's own: no property, nothing that a user wrote.
_BINDABLE = (types.FunctionType, staticmethod, type(str.join), type(object.__init__),
             types.GetSetDescriptorType, types.MemberDescriptorType,
             type(dict.__dict__["fromkeys"]))
_class_mro = type.__dict__["__mro__"].__get__     # unlike `cls.__mro__` and vars(cls), these two
_class_dict = type.__dict__["__dict__"].__get__   # run nothing of a metaclass


def _lookup(value, name):
    """`value.name` as the language defines it, or LookupError where that would run a user's code.

    Up to 3.11 inspect.getattr_static runs a metaclass's; and it doesn't bind what it finds.
    """
    is_class = issubclass(type(value), type)
    for owner in [type(value), value] if is_class else [type(value)]:
        found = _find(owner, name)
        if type(found) is classmethod:
            # In 3.9 to 3.12 a classmethod evaluates a property in it.
            found = found.__func__
        if not _is_exactly(found, *_BINDABLE) and _find(type(found), "__get__") is not _MISSING:
            raise LookupError("to look this up could run code")
    return (type if is_class else object).__getattribute__(value, name)


def _find(kind, name):
    """What the class `kind` or the first of its bases has under `name`, unbound."""
    for base in _class_mro(kind):
        if name in _class_dict(base):
            return _class_dict(base)[name]
    return _MISSING


def _instance_dict(value):
    """The object's own `__dict__`; an empty one, where it has none or that can't be told."""
    try:
        found = _lookup(value, "__dict__")
    except (LookupError, AttributeError):
        return {}
    return found if type(found) is dict else {}


def _is_exactly(value, *kinds):
    """Whether the value's class is one of `kinds`: asked by `is`, as `in` could run a metaclass's.
    """
    return any(type(value) is kind for kind in kinds)


def _attribute_names(value):
    """What its own `__dir__` says if that works, else the names in its classes and `__dict__`."""
    kind = type(value)
    if type.__getattribute__(kind, "__name__") in ("_LazyModule", "lazy_import"):
        # To look into it would load it.
        return []
    own = _find(kind, "__dir__")
    if own is not object.__dir__ and own is not type.__dir__:
        with suppress(Exception):         # whatever the user's code raises
            return list(itertools.islice(own.__get__(value, kind)(), _NAMES_LIMIT))
    bases = _class_mro(value if issubclass(kind, type) else kind)
    return itertools.chain(_instance_dict(value), *map(_class_dict, bases))


def _select(names, word):
    """Those names that continue `word`, sorted.

    `_private` and `__special__` ones only where the word begins so, or there are no others.
    """
    # list() copies at once: other threads may change a dict meanwhile.
    found = {name for name in list(names)
             if type(name) is str and name.startswith(word) and name.isidentifier()}
    for hidden in ("_", "__"):
        shown = [name for name in found if not name.startswith(hidden)]
        if shown:
            return sorted(shown)
    return sorted(found)


def _hint(name, called):
    """The call as one would write it, and the first line of its doc."""
    doc = None
    with suppress(LookupError, AttributeError):
        doc = _lookup(called.__func__ if type(called) is types.MethodType else called, "__doc__")
    lines = [line.strip() for line in doc.splitlines() if line.strip()] if type(doc) is str else []
    # The documentation of C code often begins with the call.
    shows_call = bool(lines) and lines[0].startswith(name + "(")
    signature = _signature(called)
    if signature is not None:
        call = name.strip("]") + str(signature).replace("Ellipsis", "...")
    else:
        call = lines[0] if shows_call else name + "(...)"
    return "\n".join([call] + lines[1 if shows_call else 0:][:1])


def _signature(called):
    """Its inspect.Signature, without annotations; None if none can be had safely."""
    import inspect
    try:
        found = inspect.signature(_bare(called))
    except Exception:
        return None
    return found.replace(parameters=[
        _with_plain_default(each) for each in found.parameters.values()])


def _bare(called):
    """Return something with the signature of `called` that runs nothing while that is looked at.

    inspect itself asks for __signature__, __wrapped__ and more by getattr, and calls what it finds.
    """
    kind = type(called)
    if is_python_function(called):
        wrapped = _instance_dict(called).get("__wrapped__")
        return _bare(wrapped) if is_python_function(wrapped) else _copy_function(called)
    if kind is types.MethodType:
        return types.MethodType(_bare(called.__func__), 0)
    call = _find(kind, "__call__")
    if is_python_function(call):
        return types.MethodType(_bare(call), 0)
    if issubclass(kind, type):
        return _bare_class(called)
    # A bare staticmethod has a __wrapped__.
    if kind is not staticmethod and _is_exactly(called, *_BINDABLE, types.BuiltinFunctionType):
        return called
    raise ValueError("its signature can't be had safely")


def _bare_class(called):
    """Return what has the signature of a class: its first `__new__` or `__init__` in Python.

    Or the first base that no class statement made, which inspect can be asked about.
    """
    for base in _class_mro(called):
        for name in "__new__", "__init__":
            made = _class_dict(base).get(name)
            made = made.__func__ if type(made) is staticmethod else made
            if is_python_function(made):
                return types.MethodType(_bare(made), 0)
        if not type.__flags__.__get__(base) & HEAP_TYPE:
            return (lambda: None) if base is object else base
    raise ValueError("its signature can't be had safely")


def _copy_function(function):
    """Return a function of the same parameters, without annotations: to ask for them runs code."""
    copy = types.FunctionType(function.__code__, {}, function.__name__, function.__defaults__,
                              function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _with_plain_default(parameter):
    """Return `parameter`, with `...` for a default whose repr could be a user's code, or long."""
    default = parameter.default
    is_plain = default is parameter.empty or _is_exactly(
        default, type(None), bool, int, float, str, bytes)
    return parameter if is_plain else parameter.replace(default=...)


def _names_in_module(module):
    """What a module offers: asked if it is loaded, else read from its source; and submodules."""
    loaded = sys.modules.get(module)
    names = _names_in_source(module) if loaded is None else _attribute_names(loaded)
    return itertools.chain(names, _submodules(module))


def _names_in_source(module):
    """The names that a module which is not loaded binds at its top level, if it has a source."""
    import dis
    spec = _find_spec(module)
    source = spec.loader.get_source(module) if spec is not None and spec.loader is not None else ""
    # The parser warns of doubtful escapes, and filters of warnings are process-wide.
    source = re.sub(r"\\[^\n]", "..", source or "")
    code = compile(source, module, "exec", 0, True)
    return [each.argval for each in dis.get_instructions(code) if each.opname == "STORE_NAME"]


def _submodules(package):
    """The names of a package's modules, of all modules for "", with nothing imported."""
    import pkgutil
    prefix = package + "." if package else ""
    known = [*sys.modules, *sys.builtin_module_names]
    names = {name[len(prefix):] for name in known if type(name) is str and name.startswith(prefix)}
    found = pkgutil.iter_modules([folder or os.getcwd() for folder in _search_path(package)])
    return names.union(module.name for module in found)


def _search_path(package):
    """The folders in which the modules of a package are looked for."""
    if package in sys.modules:
        path = _instance_dict(sys.modules[package]).get("__path__", ())
    elif package:
        spec = _find_spec(package)
        path = spec and spec.submodule_search_locations or ()
    else:
        path = sys.path
    return [folder for folder in list(path) if type(folder) is str]


def _find_spec(module):
    """The spec of a module in a file; finders that the program has added are not asked."""
    from importlib.machinery import PathFinder
    return PathFinder.find_spec(module, _search_path(module.rpartition(".")[0]))


# === 7. Jobs =================================================================
# Four rooms: jobs; errands, calls that one thread makes for another; and the two that make them,
# the main thread and the thread of an event loop, for await.
# A job is a thread with an outcome that can be fetched later, from any session.
# The table is one for the process, so that a job started in one session is known in all.
# An Outcome is written by the thread that makes the call, and read by any:
#     bg(f)                  a Job runs f                       fg(job) returns or raises it
#     an input, Ctrl+Z       its Evaluator is the Job           fg(job), the Outcome command
#     main_thread(f), await  an Errand runs f elsewhere         the session's thread, in `wait`

class Outcome:
    """What became of a call or an input. Jobs, `_`, pdb.pm() and the Outcome command read it.

    One thread writes it: `state` last, so that whoever sees "done" sees the rest too.
    """

    def __init__(self):
        self.state = "running"    # then "done"; "background": the input has become a job
        self.value = None         # what was returned, or displayed last
        self.exception = None     # or raised
        self.facts = {}           # texts of these and an exit status, for the Outcome command

    def run(self, function, *args, **kwargs):
        """Call the function and keep what becomes of it."""
        try:
            self.value = function(*args, **kwargs)
        except BaseException as exc:
            # Whatever it is: `get` raises it.
            self.exception = exc
        finally:
            self.state = "done"

    def get(self):
        """Return the value, or raise the exception."""
        if self.exception is not None:
            raise self.exception
        return self.value


class Job(threading.Thread):
    """A callable that runs in the background, and what became of it."""

    def __init__(self, function, *args, **kwargs):
        name = getattr(function, "__name__", None) or type(function).__name__
        super().__init__(name="hotrepl job %s" % name, daemon=True)
        self.number = 0           # set by the table; 0: not in it
        self.result = Outcome()   # written by the job's own thread
        self.output = JobOutput()  # what an evaluation printed since it went to the background
        self.started = time.monotonic()   # of an Evaluator: the input that it runs
        self.ended = None         # when; None: it runs
        self._call = (function, args, kwargs)     # until it runs, which lets go of them

    @property
    def state(self):
        """One of "running", "done", "failed"."""
        is_failed = self.result.state == "done" and self.result.exception is not None
        return "failed" if is_failed else self.result.state

    @property
    def value(self):
        """What the callable returned."""
        return self.result.value

    @property
    def exception(self):
        """What the callable raised."""
        return self.result.exception

    def run(self):
        function, args, kwargs = self._call
        del self._call
        self.result.run(function, *args, **kwargs)
        self.ended = time.monotonic()

    def outcome(self):
        """Return the value, or raise the exception; while it runs, return the job itself."""
        return self if self.state == "running" else self.result.get()

    def __repr__(self):
        if not self.number:
            # The thread of a session, which is no job yet.
            return super().__repr__()
        seconds = (self.ended or time.monotonic()) - self.started
        return "<job %d %s: %s, %.0f s>" % (self.number, self.name[len("hotrepl job "):],
                                            self.state, seconds)


class JobOutput:
    """The newest LIMIT_BYTES of what a job printed.

    It takes the place of the session's Connection as a stream's `sink`, once an evaluation has
    gone to the background.
    """

    LIMIT_BYTES = 1 << 20
    is_broken = False             # as a Connection whose peer is gone

    def __init__(self):
        self.lock = threading.RLock()
        self._data = bytearray()  # guarded by lock

    def send(self, data, stream="stdout"):
        """Keep `data`, and drop the oldest where it is too much."""
        with self.lock:
            self._data += data
            del self._data[:-self.LIMIT_BYTES]

    def tick(self, flush):
        """Take what was printed so far; called by the Flusher."""
        flush()

    def __str__(self):
        with self.lock:
            return self._data.decode("utf-8", "replace")


class JobTable:
    """The jobs of this process by number; each use of the dict is one operation, and so no lock."""

    def __init__(self):
        self._jobs = {}           # number -> Job
        self._numbers = itertools.count(1)

    def add(self, job):
        """Give `job` a number and return it."""
        job.number = next(self._numbers)
        self._jobs[job.number] = job
        return job

    def find(self, job):
        """Return the Job that `job` is, or is the number of; ValueError if there is none."""
        if isinstance(job, Job):
            return job
        known = dict(self._jobs)
        if job not in known:
            raise ValueError("no job %s, there are: %s"
                             % (shorten(job), ", ".join(map(str, known)) or "none"))
        return known[job]

    def drop(self, job):
        """Forget a job whose outcome was fetched."""
        self._jobs.pop(job.number, None)

    def all(self):
        """Return the jobs whose outcome nobody fetched yet, the oldest first."""
        return JobList(self._jobs.values())


class JobList(list):
    """A list of jobs that shows one a line."""

    def __repr__(self):
        return "\n".join(map(repr, self)) or "no jobs"


JOBS = JobTable()


# --- Errands: a call that another thread makes, while this one waits for it ---
# Made by the main thread (next room) or the thread of an event loop (the room after it). What the
# call prints is kept in a Backlog (section 4) and printed by who waits, so that a slow client holds
# up nobody else. Who makes the call may be in a signal handler, in the middle of anything: so there
# are bare locks only, which no thread holds while it does something else.
#     who waits     Errand(...)   wait ................................. prints; value or exception
#     who makes it       claim -> True: run or fail -> finish
#                        claim -> False: who waited has given up, `abandon`

TICK_S = 0.02                     # how often who waits for an errand looks around
DEAF_TICKS = 10                   # then it is asked whether the main thread lets signals in


class Errand:
    """A call that another thread makes for the one that waits for it."""

    def __init__(self, function, *args, context=None):
        self.evaluator = current_evaluator()      # for whom it is
        self.context = context    # a coroutine's steps run in it
        self.is_abandoned = False  # nobody waits any more; written by who waited
        self.task = None          # where it is a coroutine's: what to cancel; written by its loop
        self.ticks = 0            # how often who waits has looked around
        self._call = function, args       # of a coroutine function, no args
        self._outcome = Outcome()         # written by who runs it
        self._printed = Backlog()         # what the call prints, for who waits
        self._unclaimed = threading.Lock()        # who acquires it runs the call, or cancels it
        self._unfinished = threading.Lock()       # held until the outcome is known
        self._unfinished.acquire()

    def has_begun(self):
        """Return whether somebody runs it, or nobody will."""
        return self._unclaimed.locked()

    def claim(self):
        """Return True to one caller only: it is to run the call, or nobody is."""
        return self._unclaimed.acquire(False)

    def run(self, shared=()):
        """Make the call; exceptions of the classes `shared` are raised here as well."""
        function, args = self._call
        try:
            with ROUTER.lent(self.evaluator, self._relay):
                # What it prints comes to who waits.
                self._outcome.run(function, *args)
            if isinstance(self._outcome.exception, shared):
                raise self._outcome.exception
        finally:
            self.finish()

    def fail(self, exception):
        """Let `wait` raise `exception`, in place of the call."""
        self._outcome.exception = exception
        self.finish()

    async def run_coroutine(self):
        """As `run`, for a coroutine function, in a task on an event loop.

        `finish` is called by the task's end.
        """
        try:
            self._outcome.value = await self.in_steps(self._call[0])
        except BaseException as exc:
            # SystemExit too: it would end the program's loop.
            self._outcome.exception = exc

    @types.coroutine
    def in_steps(self, function):
        """Await what the coroutine function returns; each step of it prints for who waits."""
        coroutine = function()
        step, sent = coroutine.send, None
        while True:
            try:
                with ROUTER.lent(self.evaluator, self._relay):
                    wanted = self.context.run(step, sent)
            except StopIteration as exc:
                return exc.value
            try:
                step, sent = coroutine.send, (yield wanted)
            except BaseException as exc:
                # A cancellation or GeneratorExit is the coroutine's business.
                step, sent = coroutine.throw, exc

    def finish(self, *_):
        """Let `wait` return."""
        self._unfinished.release()

    def wait(self, tick=None):
        """Return the value, or raise the exception; print what was printed.

        `tick(self)` is called now and then; what it raises ends the wait, as an interrupt does.
        """
        while not self.has_ended():
            self._print()
            if tick is not None:
                tick(self)
        self._print()
        try:
            return self._outcome.get()
        finally:
            # The frames of the exception hold this errand.
            self._outcome.exception = None

    def has_ended(self):
        """Wait for the outcome, but not for long; return whether it is there."""
        if self._unfinished.acquire(True, TICK_S):
            # For whoever asks next.
            self._unfinished.release()
            return True
        return False

    def abandon(self):
        """Wait no more, as who waits: cancel it unless it has begun; return whether it goes on."""
        self.is_abandoned = True
        return not self.claim() and self._unfinished.locked()

    def _relay(self, kind, own):
        """Return the stream that the call has in place of the thread's `own`; see ROUTER.lent."""
        if kind == "stdin":
            return SessionInput(_refuse_to_ask)
        return Relay(kind, self._printed, own, lambda: not self.is_abandoned)

    def _print(self):
        for kind, text in self._printed.take():
            getattr(sys, kind).write(text)


def _refuse_to_ask():
    raise OSError("only the session's own thread can ask its client for input")


# --- Main thread: reached by a signal, from whatever it does ---
# SIGURG is ignored where nobody handles it (signal(7)), so one that comes after we have left does
# no harm. Python runs the handler between two bytecodes; it wakes the main thread from sleep and
# select, which go on afterwards (PEP 475). Tk's main loop needs an event besides, to come back to
# Python.
#     session's thread    call: append an Errand, send the signal, wait; send it again at each tick
#     main thread         _on_signal: claim what waits, run it, one after the other
#     ... that is deaf    while it is in C, nothing; where it blocks the signal, the user is told.
#                         Ctrl+C gives up

class MainThread(Installed):
    """Makes calls in the main thread, for whoever waits in another; used by servers that run."""

    SIGNAL = getattr(signal, "SIGURG", None)

    def __init__(self):
        super().__init__()
        self._missing = ""        # why it can't work, if so
        self._before = None       # the handler before ours
        self._waiting = collections.deque()       # errands that nobody has begun
        self._running = []        # those that have, innermost last; only in the main thread
        self._waker = None        # the thread that wakes Tk last

    def acquire(self):
        """Begin to use it: take the signal if it is free and this is the main thread.

        Each server tries: the one before may have been started in another thread.
        """
        super().acquire()
        if not self._is_installed():
            self._missing = self._take_signal()

    def _uninstall(self):
        """Fail what waits, and give the signal back, which the main thread has to do."""
        for errand in take_all(self._waiting):
            if errand.claim():
                errand.fail(RuntimeError(
                    "the server was stopped before the main thread came to it"))
        if threading.current_thread() is threading.main_thread():
            self._restore()
        elif self._is_installed():
            restore = Errand(self._restore)
            self._waiting.append(restore)
            end = time.monotonic() + STOP_TIMEOUT_S
            while not restore.has_ended() and time.monotonic() < end:
                self._send_signal(restore)

    def call(self, function, *args):
        """Return what `function` returns in the main thread; see main_thread()."""
        if threading.current_thread() is threading.main_thread():
            return function(*args)
        if not self._is_installed():
            raise RuntimeError("main_thread() can't work: "
                               + (self._missing or "the program has taken SIGURG since start()"))
        errand = Errand(function, *args)
        try:
            self._waiting.append(errand)
            self._send_signal(errand)
            return errand.wait(self._pursue)
        finally:
            if errand.abandon():
                print("hotrepl: the call has begun and goes on in the main thread",
                      file=sys.stderr)
                for waiting in list(self._waiting)[:1]:
                    # The next one may run now.
                    self._send_signal(waiting)

    def forget(self):
        """In a forked child: no server runs, and no call."""
        self._running, self._waker = [], None
        super().forget()

    def _take_signal(self):
        """Take the signal; return why it can't be taken, or "". """
        if self.SIGNAL is None or not hasattr(signal, "pthread_kill"):
            return "this system has no signal for it"
        if threading.current_thread() is not threading.main_thread():
            return "start() was not called in the main thread, which alone can take a signal"
        handler = signal.getsignal(self.SIGNAL)
        if handler not in (signal.SIG_DFL, signal.SIG_IGN):
            return "the program has a handler of its own for SIGURG: %s" % shorten(handler)
        try:
            self._before = signal.signal(self.SIGNAL, self._on_signal)
        except ValueError as exc:
            return "start() was called in a sub-interpreter (%s)" % exc
        return ""

    def _is_installed(self):
        return self.SIGNAL is not None and signal.getsignal(self.SIGNAL) == self._on_signal

    def _restore(self):
        if self._is_installed() and not self._users:
            with suppress(ValueError):
                # PyPy raises it in a child that a thread has forked.
                signal.signal(self.SIGNAL, self._before)

    def _send_signal(self, errand):
        """Have the main thread look at what waits, unless it has begun `errand`.

        Again and again: a signal that comes just before the main thread enters a wait in C does
        not end that wait.
        """
        if errand.has_begun():
            return
        signal.pthread_kill(threading.main_thread().ident, self.SIGNAL)
        root = getattr(sys.modules.get("tkinter"), "_default_root", None)
        if root is not None and (self._waker is None or not self._waker.is_alive()):
            self._waker = threading.Thread(target=_wake_tk, args=(root,), daemon=True,
                                           name="hotrepl waker of Tk")
            self._waker.start()

    def _pursue(self, errand):
        """Send the signal again; say it, once, if the main thread does not let it in."""
        self._send_signal(errand)
        errand.ticks += 1
        if errand.ticks == DEAF_TICKS and not errand.has_begun() and self._is_blocked():
            print("hotrepl: the main thread blocks SIGURG (pthread_sigmask): it can't be "
                  "reached while it does; Ctrl+C gives up", file=sys.stderr)

    def _is_blocked(self):
        """Return whether the main thread blocks the signal, where the system tells: proc(5)."""
        try:
            with open("/proc/self/task/%d/status" % os.getpid(), encoding="latin-1") as file:
                blocked = file.read().partition("\nSigBlk:")[2].split()[0]
        except (OSError, IndexError):
            return False
        return bool(int(blocked, 16) & 1 << self.SIGNAL - 1)

    def _on_signal(self, signum, frame):
        """Make the calls that wait, one after the other; runs in the main thread.

        Inside a call that runs, another one is made only where nobody waits for the first any more:
        it may be a window's main loop.
        """
        if self._running and not self._running[-1].is_abandoned:
            return
        for errand in take_all(self._waiting):
            if errand.claim():
                self._running.append(errand)
                try:
                    # A KeyboardInterrupt is the program's too: somebody stops it by Ctrl+C.
                    errand.run(KeyboardInterrupt)
                finally:
                    # By slice, not pop(): a fork in the call has emptied it.
                    del self._running[-1:]
        loop = sys.modules["asyncio"]._get_running_loop() if "asyncio" in sys.modules else None
        if loop is not None:
            # Have the loop look at what the calls have scheduled.
            loop.call_soon_threadsafe(int)


def _wake_tk(root):
    """Give Tk's main loop an event, if it runs; in a thread, as the call waits for the loop.

    Threaded Tcl takes calls from any thread.
    """
    try:
        root.tk.call("list")
    except Exception as exc:
        # RuntimeError: it doesn't run. TclError: the window is gone.
        log.debug("Tk: %s", exc)


MAIN = MainThread()


# --- Await: on the program's event loop, or one of the session's own ---
# An input that awaits is a coroutine; the session's thread waits for it as for an errand:
#     start(run_coroutine=...)   run_by: the given function runs it, in a thread of its own
#     start(loop=...)            run_on_loop: as a task on the program's asyncio loop
#     neither                    run_on_loop: on the session's OwnLoop, also between inputs
# So is an input that only names what asyncio has for code in a loop, as create_task(); it is
# called there. Each step runs in the session's context, and prints to it, in the loop's thread;
# what the loop's other tasks print does not come here. Ctrl+C cancels the task and waits for its
# end; a second one leaves it alone.

def run_on_loop(loop, context, function):
    """Call `function` on an asyncio loop, in `context`, and return its result.

    Where it is a coroutine function, that is the coroutine's, which runs in a task. A
    KeyboardInterrupt cancels the task and waits for its end; a second one only leaves.
    """
    def begin():
        if not errand.claim():
            return
        if not is_awaited:
            # Not in a task: all_tasks() is to show the program's only.
            errand.run()
            return
        errand.task = loop.create_task(errand.run_coroutine())
        errand.task.add_done_callback(errand.finish)

    def check(_=None):
        if not loop.is_running():
            raise RuntimeError("the session's event loop %s; start(loop=...) names another"
                               % ("is closed" if loop.is_closed() else "does not run"))

    check()
    is_awaited = function.__code__.co_flags & CO_COROUTINE
    errand = Errand(function, context=context) if is_awaited else Errand(context.run, function)
    try:
        loop.call_soon_threadsafe(begin)
        return errand.wait(check)
    except (KeyboardInterrupt, SystemExit) as exc:
        if errand.claim() or errand.has_ended() or errand.task is None:
            # It never began, the exception is its own, or there is nothing to cancel.
            raise
        loop.call_soon_threadsafe(lambda: errand.task.cancel())
        if isinstance(exc, SystemExit):
            raise
        return _wait_cancelled(errand, check)
    finally:
        errand.abandon()


def _wait_cancelled(errand, check):
    """Wait for the end of a cancelled task; its CancelledError is the user's KeyboardInterrupt."""
    import asyncio
    try:
        # Most end at once; of the others the user is told.
        if not any(errand.has_ended() for _ in range(10)):
            print("hotrepl: waiting for the task to end; Ctrl+C again leaves it", file=sys.stderr)
        return errand.wait(check)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def run_by(runner, context, function):
    """Return what runner(coroutine) returns, called in a thread of its own; for another framework.

    The coroutine is `function`'s, and runs in `context`. Whatever `runner` waits in, a
    KeyboardInterrupt ends the wait here.
    """
    def run():
        return runner(_awaiting(errand.in_steps(function)))
    errand = Errand(run, context=context)
    errand.claim()
    try:
        threading.Thread(target=errand.run, name="hotrepl coroutine", daemon=True).start()
        return errand.wait()
    finally:
        errand.abandon()


async def _awaiting(awaitable):
    """A real coroutine around an awaitable, as a runner may want."""
    return await awaitable


class OwnLoop:
    """An asyncio loop in a thread of its own, for a session whose program has none."""

    def __init__(self):
        import asyncio
        self.loop = asyncio.new_event_loop()
        self._runs = threading.Event()    # set by the loop itself
        self._thread = threading.Thread(target=self._run, name="hotrepl loop", daemon=True)
        self._thread.start()
        self._runs.wait()

    def close(self):
        """Cancel its tasks and end; waits for that up to STOP_TIMEOUT_S."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self):
        """Run the loop until `close`, then cancel its tasks, as asyncio.run() does."""
        import asyncio
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._runs.set)
        self.loop.run_forever()
        tasks = asyncio.all_tasks(self.loop)  # novm
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


def new_context():
    """Return a copy of the calling thread's contextvars.Context; 3.6 has none."""
    if sys.version_info < (3, 7):
        return _NoContext()
    # Built in, so it can be had after os.chroot() too; contextvars itself is a file.
    import _contextvars
    return _contextvars.copy_context()


class _NoContext:
    """Takes the place of a Context on 3.6."""

    def run(self, function, *args):
        return function(*args)

    def copy(self):
        return self


# === 8. Hot patching =========================================================
# After reload() the process behaves as a fresh process of the new files would, and its state
# is kept. Four phases hand values on:
#   know   module -> the text that runs, or unknown         touches files
#   diff   old and new text -> pairs of statements          pure
#   apply  pairs -> journal, in the order of the imports    touches the program
#   tell   pairs, steps, journal -> ReloadReport            touches nothing
# A worked example. shop.py had              and has now
#   RATE = 2                                   RATE = 3
#   PRICE = RATE * 10                          PRICE = RATE * 10
#   @app.route("/buy")                         @app.route("/buy")
#   def buy(n): return PRICE * n               def buy(n): return PRICE * n + 1
# know: the text of back then was noted. diff: (RATE = 2, RATE = 3, "value"), (buy, buy, "body");
# all else is "same". apply: buy's old function gets the code that the new file has at that line,
# and no decorator runs; `RATE = 3` runs; PRICE is pure, reads RATE and is what RATE = 2 made of
# it, so it is 30 now. Each of the three is in the journal with what takes it back. tell:
# "changed: RATE, buy", "followed: PRICE".
# Words: an *edit* is one module of a reload; a *pair* is a statement of the old text and its like
# in the new one; a *scope* is a module or a class, where statements bind names; to *fold* is to
# give an old object what a new one is; *registrations* are the entries in lists and dicts that a
# decorator or a class statement made.
# Runs in the thread that calls it, one transaction at a time; other threads go on and see each
# function either old or new. May use: section 2.


class _Hot:
    """What must outlive a reload of this file itself: it is made once for each copy of the file."""

    def __init__(self):
        self.lock = threading.RLock()   # one transaction at a time
        self.known = {}                 # module name -> _Known; each operation on it is atomic
        self.changes = []               # _Change, newest last; guarded by lock
        self.count = 0                  # of changes so far; guarded by lock
        self.hooks = {}                 # reference to a class -> functions of on_reload()
        self.module_count = 0           # how many were loaded when note_sources() looked last
        self.loaded_at = time.time()    # where no /proc says when the process began


HOT = globals().setdefault("HOT", _Hot())

_COMPILE_ERRORS = (SyntaxError, ValueError, MemoryError, RecursionError)  # the last two: too deep


def reload(module=None, *, everything=False, dry_run=False):
    """Make the file on disk the running program, or change nothing; return a ReloadReport.

    `module` is a module or its name; without it, every loaded module of the program whose source
    changed is reloaded, all in one transaction. Only statements that changed are executed, and of
    functions whose bodies changed none, unless `everything`. With `dry_run` nothing changes and
    the report says what would run. Raises ReloadError (with the cause) when a file can't be read
    or compiled, or when its code raises. May be called in any thread; waits for a reload that
    runs in another one.
    """
    with HOT.lock, _collector_off():
        report = ReloadReport(is_qualified=module is None)
        edits = _find_edits(module, everything, report)
        apply = _Apply(report, edits, everything)
        if dry_run:
            apply.foretell()
        elif edits:
            apply.commit()
            _hot_remember("reload", report.names(), apply.journal)
        return report


Stale = record("Stale", "name reason count")


class ReloadReport:
    """What a reload did, or with dry_run would do; prints as a short list."""

    _TITLES = ("changed", "added", "removed", "followed", "not_run_again", "unsaved")

    def __init__(self, is_qualified=False):
        self.changed = []  # names whose code or value is new (a statement without one: its line)
        self.added = []  # names that are new
        self.removed = []  # names and nameless statements that the new source no longer has
        self.followed = []  # unchanged: names that were made of what changed, or imported it
        self.not_run_again = []  # unchanged statements that used what changed
        self.unsaved = []  # typed over a file's definition; dry_run: all that is in no file
        self.stale = []  # Stale(name, reason, count of live objects): what still runs old code
        self.cant_tell = []  # where nobody knows what ran: what is otherwise than in the file
        self.notes = []  # sentences on how it was done
        self.looked_at = 0  # how many modules were looked at ...
        self.folders = []  # ... and the folders that they lie in
        self._is_qualified = is_qualified  # names carry their module

    def __repr__(self):
        lines = []
        for title in self._TITLES:
            if getattr(self, title):
                lines.append("%s: %s" % (title.replace("_", " "), ", ".join(getattr(self, title))))
        lines += ["stale: %s: %s (%d live)" % entry for entry in self.stale]
        lines += ["can't tell: " + text for text in self.cant_tell]
        lines += ["note: " + note for note in self.notes]
        return "\n".join(lines) or "nothing changed" + self._looked_at()

    def _looked_at(self):
        """Say where it has looked: "nothing changed" is true of no more."""
        if not self._is_qualified:
            return ""
        shown = self.folders[:3] + ["..."] if len(self.folders) > 3 else self.folders
        return " in %d module%s below %s" % (
            self.looked_at, "" if self.looked_at == 1 else "s", ", ".join(shown) or "no folder")

    def add(self, title, module_name, names):
        """Append `names` of a module to one list of the report, each once."""
        entries = getattr(self, title)
        for name in names:
            name = "%s.%s" % (module_name, name) if self._is_qualified else name
            if name not in entries:
                entries.append(name)

    def names(self):
        """Return what the history lists: the names that a transaction has touched."""
        return self.changed + self.added + self.removed


@contextmanager
def _collector_off():
    """Keep the garbage collector from walking the heap again and again while much is made.

    PyPy's walks it in small steps, and without it each look at the heap would leave its garbage.
    """
    was_on = gc.isenabled()
    if not IS_PYPY:
        gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# --- Know: which modules are the program's, and what text runs in them ---
# A module is the program's own where its file lies in no folder of a library. For each of them
# note_sources() keeps the text that runs, in the background after start() and at each prompt. A
# file that was written after the process began may be newer than what runs: its text is known
# only where nothing that lives speaks against it, see "Unknown text". reload() asks each own file
# for its stamp, and reads those whose stamp is another. No module's own code runs while it is
# looked at: it may be lazy, a proxy or a liar.

_Known = record("_Known", "module path text stamp")   # text None: unknown


def note_sources(modules=None):
    """Remember the source that each module of the program runs now.

    Called in the background when the server has started, and at each prompt. Only modules not
    seen before are looked at; each costs the reading of its file. May be called in any thread.
    """
    count = len(sys.modules)
    if modules is not None:
        names = [(module.__name__, module) for module in modules]
    elif count != HOT.module_count:
        names = [(name, module) for name, module, _ in own_modules()]
        HOT.module_count = count
    else:
        names = []
    for name, module in names:
        known = _known_of(name, module) or _note(module)
        if known is not None:
            HOT.known[name] = known


def _known_of(name, module):
    """Return the _Known of a module; None where it was not noted, or another one of its name."""
    known = HOT.known.get(name)
    return known if known is not None and known.module() is module else None


def _note(module):
    """Return the _Known of a module from its file, or None where it has none or is half imported.

    What was written after the process began may not be what runs: it is compared with what lives.
    """
    space, path = _space_of(module), _source_path(module)
    if path is None:
        return None
    if getattr(space.get("__spec__"), "_initializing", False):
        # It is asked again at the next prompt.
        HOT.module_count = -1
        return None
    try:
        stamp = _stamp(path)
        with open(path, "rb") as file:
            text = file.read()
    except (OSError, ValueError):
        return None
    is_older = max(stamp[0], stamp[3]) < _process_start() * 1e9
    is_known = is_older or space is globals() or _fits(module, text, path)
    return _Known(weakref.ref(module), path, *((text, stamp) if is_known else (None, None)))


def _stamp(path):
    """Return what tells whether a file was written, or a link leads elsewhere by now."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns


@functools.lru_cache(maxsize=None)
def _process_start():
    """Return when this process began, in seconds as time.time() has them."""
    try:
        # Not by our number: /proc may be that of another namespace of processes.
        ticks = int(process_mark("self"))
        with open("/proc/uptime") as file:
            uptime_s = float(file.read().split()[0])
        return time.time() - (uptime_s - ticks / os.sysconf("SC_CLK_TCK")) - 0.02
    except (OSError, ValueError, IndexError, AttributeError):
        # There is no /proc: it was then at the latest that this file was loaded.
        return HOT.loaded_at


def _space_of(module):
    """Return the namespace of a module without running its code; of what is none, an empty one."""
    kind = type(module)
    if not issubclass(kind, types.ModuleType) or kind.__name__ == "_LazyModule":
        return _NO_SPACE
    return types.ModuleType.__dict__["__dict__"].__get__(module)  # type: ignore[index]


_NO_SPACE = types.MappingProxyType({})


def _source_path(module):
    """Return the absolute path of a module's source, or None where it has none.

    A relative one, as a script's on 3.6 to 3.8, means the folder that was current when the module
    was noted: the program may have called os.chdir() since.
    """
    space = _space_of(module)
    path, is_script = space.get("__file__"), space.get("__name__") == "__main__"
    if type(path) is not str or not path or "\0" in path or path.endswith(".pyc") or not (
            is_script or path.endswith((".py", ".pyw"))):
        return None
    if os.path.isabs(path):
        return path
    known = _known_of(space.get("__name__"), module)
    return known.path if known is not None else os.path.abspath(path)


def own_modules():
    """Return (name, module, path) of the loaded modules that lie in no folder of a library."""
    found = []
    for name, module in list(sys.modules.items()):
        path = _source_path(module)
        if path is not None and type(name) is str and not _is_library(path) and (
                _space_of(module).get("__name__") == name):
            found.append((name, module, path))
    return found


# Where the standard library is, by both its names, each with a separator at its end.
_LIBRARY = tuple(os.path.join(each, "") for folder in [os.path.dirname(os.__file__)]
                 for each in (folder, os.path.realpath(folder)))


@functools.lru_cache(maxsize=None)
def is_library_folder(folder):
    """Tell whether a folder is the standard library's or that of an installed package."""
    # The other name of a link is looked for here only: beside a busy thread an lstat() takes 5 ms.
    return _is_named_as_library(folder) or _is_named_as_library(os.path.realpath(folder))


_folder_of = functools.lru_cache(maxsize=10000)(os.path.dirname)


def _is_named_as_library(folder):
    """Tell whether a folder lies in the standard library, or in a site-packages, dist-packages."""
    return (folder + os.sep).startswith(_LIBRARY) or "-packages" + os.sep in folder + os.sep


def _is_library(path):
    """Tell whether a file lies in a folder of a library; what has no file counts as such."""
    return type(path) is not str or is_library_folder(_folder_of(path))


def _is_library_module(name):
    """Tell whether a module of this name is a library's, or is not loaded at all."""
    return _is_library(_space_of(sys.modules.get(name)).get("__file__"))


def _as_module(module):
    """Return (name, module, path) of a module or its name; raise where it has no source."""
    if isinstance(module, str):
        if module not in sys.modules:
            script = os.path.basename(str(_space_of(sys.modules["__main__"]).get("__file__")))
            raise ValueError("no module %r is loaded; %s" % (
                module, "the script is '__main__'" if script in (module, module + ".py")
                else "import it first"))
        module = sys.modules[module]
    if not isinstance(module, types.ModuleType):
        raise TypeError("expected a module or its name, not %r" % (module,))
    path, space = _source_path(module), _space_of(module)
    name, file = space.get("__name__"), space.get("__file__")
    if file is None:
        raise ReloadError("%r has no source file; use patch() for what lives in no file" % name)
    if path is None:
        raise ReloadError("%r is not Python source: %s" % (name, file))
    return name, module, path


def _find_edits(module, everything, report):
    """Return an _Edit for each module whose file is not what runs, read, compiled and compared."""
    modules = own_modules() if module is None else [_as_module(module)]
    is_asked_for = module is not None or everything
    report.looked_at = len(modules)
    report.folders = _tops({_folder_of(path) for _, _, path in modules})
    edits = []
    for name, module_, path in modules:
        report.add("unsaved", name, _typed_over(module_))
        # Of most modules no more than the stamp is read: this is all that an idle reload() costs.
        try:
            stamp, known = _stamp(path), _known_of(name, module_)
            if is_asked_for or known is None or known.stamp != stamp:
                edit = _Edit(name, module_, path, stamp)
                if is_asked_for or not edit.was or edit.text != edit.was.text:
                    edits.append(edit)
        except (OSError, ValueError) as exc:
            if module is not None:
                raise ReloadError("can't read the source of %r (%s); nothing was changed"
                                  % (name, exc)) from exc
            report.notes.append("%s is gone; %s runs on" % (path, name))
    for edit in edits:
        try:
            edit.compare()
        # 3.8's compiler takes some that is too deep to be compared.
        except _COMPILE_ERRORS as exc:
            raise ReloadError("can't compile %s (%s); nothing was changed"
                              % (edit.path, "%s: %s" % (type(exc).__name__, exc))) from exc
    return edits


def _tops(folders):
    """Return those of some folders that are below none of the others."""
    found = []
    for folder in sorted(folders):
        if not found or not (folder + os.sep).startswith(found[-1] + os.sep):
            found.append(folder)
    return found


def _typed_over(module):
    """Yield the functions of a module that were typed at a prompt over those of its file."""
    for name, value in list(_space_of(module).items()):
        if type(value) is types.FunctionType and value.__code__.co_filename[:1] == "<":
            found = _statement_of(module, name)
            if found is not None and found[1].is_function and not found[1].node.decorator_list:
                yield name


def _statement_of(module, name):
    """Return the (source, statement) that binds a name in the text that a module runs, or None."""
    source = _source_of(_known_of(module.__name__, module))
    found = source and _last_binders(source.statements).get(name)
    return found and (source, found)


def _source_of(known, newer=None):
    """Return the _Source of a _Known, or None where it is unknown, or was broken when noted."""
    try:
        return known and known.text is not None and _Source(known.text, known.path, newer) or None
    except _COMPILE_ERRORS:
        return None


class _Edit:
    """One module of a reload: the text that ran, the text on disk, what differs.

    Made by _find_edits; `compare` pairs the statements; _Apply works the pairs off.
    """

    def __init__(self, name, module, path, stamp, text=None):
        self.name, self.module, self.path, self.stamp = name, module, path, stamp
        self.space = _space_of(module)
        self.text = text
        if text is None:
            with open(path, "rb") as file:
                self.text = file.read()
        self.was = _known_of(name, module) or _note(module)     # an undo puts it back
        self.new = self.old = None      # _Source; old is None where nobody knows what ran
        self.pairs = []         # _Pair in the order of the new file, what is gone at the end
        self.line = None        # where the top level stands, if it runs just now
        self.before = {}        # the namespace before; set when the edit is applied
        self.held = {}          # what statements bound and other threads shall not see yet
        self.annotated = {}     # 3.14: id of a statement that ran -> numbers of its annotations
        self.subs = {}          # id of the _Statement of a class -> the pairs of its body
        self.told = []          # old text unknown: sentences, what can't be told
        self.gone = []          # the same: (path of a class, name) of what the text has no more

    def compare(self):
        """Compile the new text, parse the old one, and pair their statements."""
        self.new = _Source(self.text, self.path)
        self.line = _top_line(self.space)
        self.old = _source_of(self.was, self.new)
        # From nodes: 3.6 and 3.7 crash where they are nested too deep.
        if self.old and self.old.flags == self.new.flags and sys.version_info >= (3, 8):
            self.new.unchanged = {id(each) for each in self.old.statements if each.is_definition}
        # Some errors only the compiler finds; what it made is kept.
        self.new.fresh
        if self.old is None:
            evidence = _Evidence(self.module, self.new, self.line)
            self.pairs, self.subs, self.gone = evidence.pairs, evidence.subs, evidence.gone
            self.told = list(filter(None, evidence.found.values()))
        else:
            self.pairs = pair_statements(self.old.statements, self.new.statements,
                                         self.old.flags == self.new.flags)

    def had_imported(self, name):
        """Tell whether the old text had imported a name: what that is belongs to others."""
        binder = _last_binders(self.old.statements).get(name) if self.old else None
        return binder is not None and binder.kind in ("Import", "ImportFrom")

    def sub_pairs(self, pair):
        """Return the pairs of the body of a class that both texts have."""
        if id(pair.new) not in self.subs:
            self.subs[id(pair.new)] = pair_statements(pair.old.body, pair.new.body)
        return self.subs[id(pair.new)]

    def runs(self, statement):
        """Tell whether a statement of the new text, of the module or of a class, is executed."""
        pairs = itertools.chain(self.pairs, *self.subs.values())
        return any(pair.new is statement and pair.change not in _LEFT_ALONE for pair in pairs)

    def is_not_reached(self, statement):
        """Tell whether the top level, which runs just now, has not come to a statement yet."""
        if self.line is None:
            return False
        if self.old is None:
            return statement.end >= self.line
        news = [pair.new for pair in self.pairs]
        reached = [k for k, pair in enumerate(self.pairs) if pair.change in ("same", "moved")
                   and pair.old.start < self.line]
        return news.index(statement) > max(reached, default=-1)

    def lost_values(self, statement):
        """Return the values of names that a statement reads, which its module deletes again."""
        found = {}
        for each in self.new.statements:
            if each is statement:
                break
            if each.is_pure and each.binds & statement.names.reads and not (
                    each.binds & set(self.space)):
                value = _pure_value(each.node.value, dict(self.space, **found))
                found.update((name, value) for name in each.binds if value is not _MISSING)
        return found

    def names_gone(self):
        """Return the names to take away: bound by the old text and not by the new one."""
        if self.old is None:
            gone = {name for path, name in self.gone if not path}
        else:
            gone = set() if "*" in self.new.names else self.old.names - self.new.names - {"*"}
        return sorted(
            name for name in gone.intersection(self.before or self.space)
            - _IMPORT_NAMES.difference(["__doc__"]) if sys.modules.get(
                "%s.%s" % (self.name, name), _MISSING) is not self.space.get(name))


# --- Diff: the statements of two texts, and what became of each; pure ---
# Each statement of the new text, of a module or of a class body, becomes a pair with its like in
# the old one, and the pair says what changed:
#   old text            new text            change
#   A = 1               A = 1               same; "moved" where lines or comments are others
#   def f(): return 1   def f(): return 2   body: all is alike but inside of functions
#   def f(a): ...       def f(a=1): ...     def
#   class C: x = 1      class C: x = 2      class; the pairs of its body tell more
#   A = 1               A = 2               value, as for all other statements
#   A = 1; A += 1       A = 1               again: it is unchanged, and must run; and A += 1: gone
#                       B = 1               new
#   (unknown)           def f(): ...        live: what f is now is not what this makes
# Code is always taken from the new text as a whole, so that bytecode and lines are those of a
# fresh process; the old text is only parsed.

_Pair = record("_Pair", "old new change")
_LEFT_ALONE = ("same", "moved", "body")
_FUNCTIONS = ("FunctionDef", "AsyncFunctionDef")


def pair_statements(olds, news, is_compiled_alike=True):
    """Return the _Pairs of two lists of _Statement, in the order of the new, gone ones last."""
    partners = _partners(olds, news)
    taken = set(partners.values())
    pairs = []
    for j, new in enumerate(news):
        old = olds[partners[j]] if j in partners else None
        change = _change(old, new)
        if change in _LEFT_ALONE and not is_compiled_alike and new.has_definitions:
            change = "live" if new.is_function else "again"
        pairs.append(_Pair(old, new, change))
    pairs = _with_uncovered(pairs, olds, news)
    return pairs + [_Pair(old, None, "gone") for i, old in enumerate(olds) if i not in taken]


# What two statements have in common that belong together, the surest first. `place` is the last
# statement before them that has its partner already. Equal ones are paired from the first on;
# namesakes from the last one back, as the last one has the name in the end. Those that have nothing
# but the name in common are paired only where both texts have as many of them.
_LIKENESSES = (
    lambda each, place: each.text_key,
    lambda each, place: each.dump,
    lambda each, place: (each.label(place), each.shell),
    lambda each, place: (each.label(place), each.decorator_dump),
    lambda each, place: each.label(place),
)


def _partners(olds, news):
    """Return {index in news: index in olds} of the statements that belong together."""
    places = {id(each): i for i, each in enumerate(olds)}
    partners = {j: places[id(each)] for j, each in enumerate(news) if id(each) in places}
    for likeness in _LIKENESSES:
        groups = collections.defaultdict(lambda: ([], []))
        places = {i: j for j, i in partners.items()}
        for side, statements in enumerate((olds, news)):
            place = -1
            for k, each in enumerate(statements):
                found = k if side else places.get(k)
                if found in partners:
                    place = found
                else:
                    groups[likeness(each, place)][side].append(k)
        for ours, theirs in groups.values():
            if likeness is not _LIKENESSES[-1] or len(ours) == len(theirs):
                step = 1 if likeness in _LIKENESSES[:2] else -1
                partners.update(zip(theirs[::step], ours[::step]))
    return partners


def _change(old, new):
    """Return what became of a statement, as the table above has it; `old` may be None."""
    if old is None:
        return "new"
    if old.text_key == new.text_key:
        return "same" if old.start == new.start else "moved"
    if old.dump == new.dump:
        return "moved"
    if old.shell == new.shell:
        return "body"
    if old.is_function and new.is_function:
        return "def"
    return "class" if old.kind == new.kind == "ClassDef" else "value"


def _with_uncovered(pairs, olds, news):
    """Mark as "again" the unchanged statements that must run, for one of two reasons.

    A later statement had covered its name, and is gone or another now. Or it makes a name's value
    of the one before, as `f = wrap(f)` does: then all statements that bind the name run, from the
    first on.
    """
    last_olds, last_news = _last_binders(olds), _last_binders(news)
    runs = {id(pair.new) for pair in pairs if pair.change not in _LEFT_ALONE + ("class",)}
    # What had covered it is no more: `def f` counts again when the second `def f` has gone.
    for pair in pairs:
        for name in pair.new.binds if pair.old else ():
            covering = last_olds.get(name, pair.old)
            if covering is not pair.old and covering.binds_surely and (
                    last_news[name] is pair.new and covering.text_key != pair.new.text_key):
                runs.add(id(pair.new))
    # What a statement is made from runs before it, and so do those of which that is made, ...
    chains = [(pair.new, [each.new for each in pairs[:k] if each.new.binds & pair.new.rebinds])
              for k, pair in enumerate(pairs) if pair.new.rebinds]
    size = -1
    while size != len(runs):
        size = len(runs)
        for each, before in chains:
            if id(each) in runs:
                runs.update(map(id, before))
            elif any(id(other) in runs for other in before):
                runs.add(id(each))
    return [_Pair(pair.old, pair.new, "again")
            if id(pair.new) in runs and pair.change in _LEFT_ALONE else pair for pair in pairs]


def _last_binders(statements):
    """Return name -> the last statement that binds it."""
    return {name: statement for statement in statements for name in statement.binds}


class _once:
    """An attribute that is computed when it is first asked for, and kept in the object."""

    def __init__(self, function):
        self.function = function
        self.name = ""          # of the attribute; set when its class is made

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, owner, kind=None):
        value = vars(owner)[self.name] = self.function(owner)
        return value


class _Source:
    """A source text cut into statements.

    With `newer`, that source's statements above all lines that differ are taken over, and those
    below where their lines are the same, as parsing costs more than all else here.
    """

    def __init__(self, data, path, newer=None):
        import importlib.util
        self.path = path
        # From 0 on, as the statements count them; Python's own line numbers begin at 1.
        self.lines = importlib.util.decode_source(data).split("\n")
        shared = newer and self._sharing(newer)
        self.statements = shared or self._cut(0, len(self.lines))
        self.unchanged = ()     # ids of statements whose code runs already, at the same lines

    def _cut(self, start, end):
        """Return the statements that stand in some of the lines, with the numbers these have."""
        import ast
        text = "\n" * start + "\n".join(self.lines[start:end])
        return self.statements_of(
            compile(text, self.path, "exec", ast.PyCF_ONLY_AST, True).body, end)

    def _sharing(self, newer):
        """Return the statements: those of `newer` above and below what differs, our own between.

        None: what differs begins or ends within a statement.
        """
        ours, theirs = self.lines, newer.lines
        above, below = [next(
            (k for k, (our, their) in enumerate(zip(ours[::step], theirs[::step]))
             if our != their), min(len(ours), len(theirs))) for step in (1, -1)]
        is_as_long, last = len(ours) == len(theirs), max(above, len(ours) - below)
        head = [each for each in newer.statements if each.end <= above]
        tail = [each for each in newer.statements if each.start >= last and is_as_long]
        start, end = head[-1].end if head else 0, tail[0].start if tail else len(ours)
        try:
            return head + self._cut(start, end) + tail
        except SyntaxError:
            return None

    def statements_of(self, nodes, end):
        """Return a _Statement for each of some nodes that follow each other until a line."""
        starts = [_first_line(node) - 1 for node in nodes]
        counts = collections.Counter(starts)
        return [_Statement(node, self, start, max(stop, start + 1), counts[start] == 1)
                for node, start, stop in zip(nodes, starts, starts[1:] + [end])]

    code = _once(lambda each: compile("\n".join(each.lines), each.path, "exec", 0, True))
    # Without the unchanged: most of the time would go into compiling that.
    fresh = _once(lambda each: each.compile_alone([
        one.node for one in each.statements if id(one) not in each.unchanged])
        if each.unchanged else each.code)
    codes = _once(lambda each: _indexed(each.code))
    fresh_codes = _once(lambda each: _indexed(each.fresh))
    # What the statements bind, also by a docstring.
    names = _once(lambda each: _bound_by(each.statements).union(
        ["__doc__"] if each.statements and each.statements[0].is_constant else []))

    def codes_at(self, name, line):
        """Return the codes of functions and classes of a name that begin on a line."""
        found = self.fresh_codes.get((name, line))
        return self.codes.get((name, line), []) if found is None else found

    # What the codes in it do.
    behaviours = _once(lambda each: {
        _behaviour(code) for codes in each.codes.values() for code in codes})
    # What it imports from __future__.
    features = _once(lambda each: {
        alias.name for one in each.statements if one.kind == "ImportFrom"
        and one.node.module == "__future__" for alias in one.node.names})
    # Annotations of undecorated functions are evaluated later than the `def`, or never.
    has_lazy_annotations = _once(
        lambda each: sys.version_info >= (3, 14) or "annotations" in each.features)

    @_once
    def flags(self):
        """What `from __future__` demands of the compiler."""
        import __future__
        return sum(getattr(__future__, name).compiler_flag for name in self.features)

    def compile_alone(self, nodes):
        """Return the code object of some statements."""
        import ast
        tree = ast.parse("")
        tree.body = nodes
        return compile(tree, self.path, "exec", self.flags, True)

    def compile(self, nodes):
        """Compile statements alone, with the codes of functions as the whole text has them.

        3.11: compiled alone, they call methods of imported modules by other instructions.
        """
        return self.with_own_codes(self.compile_alone(nodes))

    def with_own_codes(self, code):
        """Return code in which each function has the code that the whole text gives it."""
        consts = []
        for const in code.co_consts:
            if isinstance(const, types.CodeType):
                found = self.codes_at(const.co_name, const.co_firstlineno)
                is_like = len(found) == 1 and found[0].co_freevars == const.co_freevars and (
                    const.co_flags & CO_OPTIMIZED)
                const = found[0] if is_like else self.with_own_codes(const)
            consts.append(const)
        return _with_consts(code, tuple(consts))

    def code_of(self, node, statement=None):
        """Return the code of a function; of several on one line, by the node they stand in."""
        found = self.codes_at(_name_of(node), _first_line(node)) or [None]
        if len(found) == 1:
            return found[0]
        alike = [each for _, each in _functions_below(statement)
                 if (_name_of(each), _first_line(each)) == (_name_of(node), _first_line(node))]
        return found[min(alike.index(node), len(found) - 1)]


def _indexed(code):
    """Return {path like __qualname__, or (name, first line): [code, ...]} of what code makes."""
    found = collections.defaultdict(list)
    for path, each in _code_paths(_nested_codes(code)):
        found[path].append(each)
        found[each.co_name, each.co_firstlineno].append(each)
    return found


class _Statement:
    """One statement of a module or of a class body; its attributes are computed when asked for.

    `dump` and `shell` are keys to compare by: of the whole tree, and of the tree with all bodies of
    functions emptied, so that an edit inside of a body changes the one and not the other.
    """

    def __init__(self, node, source, start, end, is_alone):
        self.node = node
        self.source = weakref.proxy(source)     # no cycle: a long text is many objects
        self.start, self.end = start, end       # its first line, from 0 on, and that behind it
        self.is_alone = is_alone                # on its lines
        self.kind = type(node).__name__
        self.is_function = self.kind in _FUNCTIONS
        self.is_definition = self.is_function or self.kind == "ClassDef"
        self.is_harmless = self.is_definition or self.kind in (     # defines, assigns, imports
            "Import", "ImportFrom", "Assign", "AnnAssign")
        self.binds_surely = self.is_harmless or self.kind == "AugAssign"

    names = _once(lambda each: _Names([each.node]))
    binds = _once(lambda each: {each.node.name} if each.is_definition else each.names.binds)
    # What it binds from what that was before, as `f = wrap(f)` does.
    rebinds = _once(lambda each: set() if each.is_definition else each.binds & each.names.reads)
    code = _once(lambda each: each.source.compile_alone([each.node]))   # to look at its names
    body = _once(lambda each: each.source.statements_of(each.node.body, each.end))  # of a class
    dump = _once(lambda each: _key(each.node))
    shell = _once(lambda each: _shell(each.node))
    decorator_dump = _once(
        lambda each: (each.kind, _key(getattr(each.node, "decorator_list", []))))

    text = _once(lambda each: "\n".join(each.source.lines[each.start:each.end]).rstrip())

    @_once
    def text_key(self):
        """What tells fast that a statement is unchanged: its lines, else its tree."""
        # 3.6, 3.7: where a long string comes first, its last line counts as the first one.
        return self.text if self.is_alone and self.node.col_offset >= 0 else self.dump

    def mentions(self, names):
        """Tell fast whether one of some names stands in its text."""
        return not names.isdisjoint(re.findall(r"\w+", self.text)) or (
            max(self.text, default="") > "\x7f")        # there Python names some otherwise

    def label(self, place):
        """What pairs it with its like in another text; without names, behind which it stands."""
        kind = "=" if "Assign" in self.kind else self.kind
        if self.is_definition:
            kind = "def"
        elif self.kind == "ImportFrom":
            return self.node.module, self.node.level, "*" in self.binds
        return kind, tuple(sorted(self.binds)) or place

    @property
    def is_constant(self):
        """A docstring or another statement that does nothing."""
        return self.kind == "Expr" and type(self.node.value).__name__ in (
            "Constant", "Str", "Ellipsis", "Num", "NameConstant", "Bytes")

    @property
    def acts_without_a_name(self):
        """Such as `H.append(f)`: what it did shows in no name of its own."""
        return not (self.binds or self.is_constant or self.is_main_guard or self.kind in (
            "Pass", "Assert", "Global", "AnnAssign"))

    @property
    def changes(self):
        """The name of what `H.append(f)` or `H[k] = f` changes, in a set; else an empty one."""
        return set(re.findall(r"^(\w+)[.\[]", self.title))

    @property
    def binds_at_its_end(self):
        """It binds its names when all else is done, and looks at no namespace."""
        return (self.is_definition or self.kind == "Assign") and (
            not self.names.reads & {"dir", "exec", "locals", "vars", "globals"})

    @property
    def has_definitions(self):
        """It makes functions, classes or annotations: `from __future__` matters to it."""
        return "Def'" in str(self.dump) or self.kind == "AnnAssign"

    @property
    def is_main_guard(self):
        """It is `if __name__ == "__main__":`, which a reload does not run."""
        return _tests(self.node, "__name__") and _tests(self.node, "__main__")

    @property
    def only_defines(self):
        """A function without decorators, whose head is literals: nothing runs."""
        return self.is_function and _LITERALS.issuperset(
            type(each).__name__ for each in _executed_children(self.node))

    @property
    def is_pure(self):
        """An assignment to names of an expression that runs nobody's code."""
        targets = getattr(self.node, "targets", None) or [getattr(self.node, "target", None)]
        return (self.kind in ("Assign", "AnnAssign") and self.node.value is not None
                and all(type(each).__name__ == "Name" for each in targets)
                and _is_pure_expression(self.node.value))

    @property
    def title(self):
        """Its text, or the first line where it has a body, for the report."""
        first = _first_line(self.node)
        text = self.source.lines[first - 1]
        if not self.is_alone:
            text = text[max(self.node.col_offset, 0):].split(";")[0]
        elif not hasattr(self.node, "body"):
            # 3.6 and 3.7 don't know where a statement ends.
            last = getattr(self.node, "end_lineno", first)
            text = " ".join(" ".join(self.source.lines[first - 1:last]).split())
        return shorten(text.strip().rstrip(":"), 60)


_LITERALS = {"Constant", "Num", "Str", "Bytes", "NameConstant"}      # all but the first: 3.6, 3.7
_PURE = set("""Constant Num Str Bytes NameConstant Name BinOp UnaryOp BoolOp Compare IfExp Tuple
    JoinedStr FormattedValue Attribute Subscript Index Load Add Sub Mult Div FloorDiv Mod Pow
    LShift RShift BitOr BitXor BitAnd MatMult UAdd USub Not Invert And Or Eq NotEq Lt LtE Gt GtE
    Is IsNot In NotIn""".split())


def _is_pure_expression(node):
    """Tell whether an expression calls nobody: so it can be evaluated twice, or too often."""
    import ast
    return all(type(each).__name__ in _PURE for each in ast.walk(node))


def _key(node, empties=None):
    """Return a tree as tuples, to be compared; without the bodies of functions that are emptied."""
    fields = getattr(node, "_fields", None)
    if isinstance(node, list):
        return tuple([_key(each, empties) for each in node])
    if fields is None:
        # Python says 1 == 1.0 == True; their texts differ.
        return type(node).__name__, repr(node)
    kind = type(node).__name__
    is_emptied = empties and kind in _FUNCTIONS + ("Lambda",) and empties(node)
    return (kind, (_doc_key(node), _is_generator(node)) if is_emptied else None) + tuple([
        _key(getattr(node, name, None), empties) for name in fields
        if name != "kind" and not (is_emptied and name == "body")])     # kind: of u"", it is ""


def _shell(node):
    """Return the key of a tree with all function bodies emptied."""
    return _key(node, lambda function: True)


def _is_generator(node):
    """Tell whether a function has a `yield` of its own: a decorator may ask for that."""
    import ast
    todo = list(node.body) if isinstance(node.body, list) else [node.body]
    while todo:
        each = todo.pop()
        if isinstance(each, (ast.Yield, ast.YieldFrom)):
            return True
        if type(each).__name__ not in _FUNCTIONS + ("Lambda", "ClassDef"):
            todo += ast.iter_child_nodes(each)
    return False


def _signature_key(node):
    """What others may have copied of a function: its parameters, and what a call gives."""
    return type(node).__name__, _is_generator(node), _key(node.args, False)


def _doc_key(node):
    """Return the docstring of a function whose decorator is not known, None of any other.

    Such a decorator may read it, as click's and FastAPI's do, and then has to be called again.
    """
    import ast
    if not getattr(node, "decorator_list", None) or _is_transparent(node):
        return None
    return ast.get_docstring(node, clean=False)


def _tests(node, name):
    """Tell whether a node is an `if` with a name, or a text, in its condition."""
    return type(node).__name__ == "If" and repr(name) in repr(_key(node.test))


class _Names:
    """The names that nodes bind, read, call and decorate with while they are executed."""

    def __init__(self, nodes):
        self.binds, self.reads, self.calls = set(), set(), set()
        self.heads = set()      # read by decorators, bases and keywords of definitions
        self.deletes = set()    # by `del`; these are among `binds` too
        for node in nodes:
            self._add(node)

    def _add(self, node):
        """Add what one node does to names when it is executed, by its kind."""
        kind = type(node).__name__
        if kind == "Name":
            context = type(node.ctx).__name__
            (self.reads if context == "Load" else self.binds).add(node.id)
            self.deletes |= {node.id} if context == "Del" else set()
        elif kind == "alias":
            self.binds.add(node.asname or node.name.split(".")[0])
        elif kind.endswith("Comp") or kind == "GeneratorExp":
            self._add_scope(_executed_children(node))
        elif kind == "AnnAssign" and node.value is None:
            self._add(node.annotation)
        elif _tests(node, "TYPE_CHECKING"):
            for each in [node.test] + node.orelse:
                self._add(each)
        # The names of type parameters (3.12) are of no use outside.
        elif kind not in ("TypeVar", "ParamSpec", "TypeVarTuple"):
            self._add_other(node, kind)

    def _add_other(self, node, kind):
        """Add what a node of no special kind does, and what those below it do."""
        # In def, class, `except ... as name`, and `case {**rest}`.
        for field in ("name", "rest"):
            if isinstance(getattr(node, field, None), str):
                self.binds.add(getattr(node, field))
        if kind == "Call":
            self.calls |= _Names([node.func]).reads
        elif kind == "AugAssign":
            self.reads |= _Names([node.target]).binds
        elif kind == "ClassDef":
            self._add_scope(node.body)
        if hasattr(node, "decorator_list"):
            self.heads |= _Names(node.decorator_list + getattr(node, "bases", [])
                                 + getattr(node, "keywords", [])).reads
        for child in _executed_children(node):
            self._add(child)

    def _add_scope(self, nodes):
        """Add what the nodes of a scope of its own take from the outside."""
        inner = _Names(nodes)
        self.reads |= inner.reads - inner.binds
        self.calls |= inner.calls - inner.binds
        self.heads |= inner.heads - inner.binds


def _executed_children(node):
    """Return the nodes in a node that are executed with it and in its scope."""
    import ast
    kind = type(node).__name__
    if kind in _FUNCTIONS + ("Lambda",):
        args = node.args
        named = getattr(args, "posonlyargs", []) + args.args + args.kwonlyargs
        heads = [getattr(each, "annotation", None) for each in named + [args.vararg, args.kwarg]]
        heads += args.defaults + args.kw_defaults + [getattr(node, "returns", None)]
        return getattr(node, "decorator_list", []) + [each for each in heads if each is not None]
    if kind == "ClassDef":
        return node.decorator_list + node.bases + node.keywords
    return list(ast.iter_child_nodes(node))


def _makes_annotations(code):
    """3.14: tell whether it is the code of a module's __annotate__, which is no statement's."""
    return "__conditional_annotations__" in code.co_names


def _annotation_numbers(statements):
    """3.14: return the numbers that each statement's annotations have in the module's code."""
    import dis
    numbers, last = [], 0
    for each in statements:
        codes = () if each.is_definition else _nested_codes(each.code)
        count = len([step for code in codes if _makes_annotations(code)
                     for step in dis.get_instructions(code)
                     if step.argval == "__conditional_annotations__"])
        numbers.append(range(last, last + count))
        last += count
    return numbers


def _name_of(node):
    """Return the name of a function's node, as its code object has it."""
    return getattr(node, "name", "<lambda>")


def _first_line(node):
    """Return where a definition begins: with its first decorator."""
    return min([node.lineno] + [line.lineno for line in getattr(node, "decorator_list", ())])


def _bound_by(statements):
    """Return all names that some statements bind."""
    return set().union(*[each.binds for each in statements])


def _functions_below(node, path=""):
    """Yield (path, node) of all functions in a node, with itself; a path is like __qualname__."""
    kind, body, inner_path = type(node).__name__, [], path
    if kind in _FUNCTIONS + ("Lambda",):
        yield path + _name_of(node), node
        body = node.body if isinstance(node.body, list) else [node.body]
        inner_path += _name_of(node) + ".<locals>."
    elif kind == "ClassDef":
        body, inner_path = node.body, path + node.name + "."
    for each in body:
        yield from _functions_below(each, inner_path)
    for each in _executed_children(node):
        yield from _functions_below(each, path)


_NO_SUCH = "the new source has no such function"
_UNCLEAR = "which of several in the new source it is can't be told"


def _pair_functions(old, new, path=""):
    """Yield (path, old node, new node or None, why it has none) of all functions in an old node.

    Where several have one path, those that are equal belong together; the others in order, but
    only if as many are left on both sides.
    """
    groups, partners = collections.defaultdict(lambda: ([], [])), {}
    for side, node in enumerate((old, new)):
        for where, each in _functions_below(node, path) if node is not None else ():
            groups[where][side].append(each)
    for ours, theirs in groups.values():
        for node in theirs[:]:
            like = next((each for each in ours if _key(each) == _key(node)), None)
            if like is not None:
                partners[id(like)] = node
                ours.remove(like)
                theirs.remove(node)
        if len(ours) == len(theirs):
            partners.update(zip(map(id, ours), theirs))
    for where, each in _functions_below(old, path):
        reason = _UNCLEAR if groups[where][1] else _NO_SUCH
        yield where, each, partners.get(id(each)), reason


def _default_nodes(node):
    """Return {parameter: node of its default}."""
    args = node.args
    positional = [arg.arg for arg in getattr(args, "posonlyargs", []) + args.args]
    found = dict(zip(reversed(positional), reversed(args.defaults)))
    found.update((arg.arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults)
                 if default is not None)
    return found


def _literal(node):
    """Return the value of a literal, or _MISSING."""
    import ast
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, AttributeError, SyntaxError, MemoryError, RecursionError):
        return _MISSING


def _mangled(name, class_name):
    """Return what the compiler makes of a name in a class; `class_name` is None in a module."""
    if name.startswith("__") and not name.endswith("__") and class_name:
        return "_%s%s" % (class_name.lstrip("_"), name)
    return name


# --- Unknown text: what lives is compared with the file ---
# Where nobody knows what text ran, what it has made is there still. The same pairs come out:
#   the file has            alive is                       so
#   def f(): ...            other code, other defaults     live: f gets the file's code
#   X = 1, import x, def f  no such name                   new: the statement runs
#   LIMIT = 2               1                              can't tell: LIMIT is 1, the file says 2
#   conn = connect()        anything                       same: state is never made anew
#   no f                    a function f of this file      gone
#   no X                    X = 1                          can't tell: X is not in the file
# So also in classes. What is told and not done, a user who knows better does by hand.


def _fits(module, text, path):
    """Tell whether a text may well be the one that a module runs."""
    try:
        evidence = _Evidence(module, _Source(text, path))
    except _COMPILE_ERRORS:
        return False
    return not evidence.found and not evidence.gone and all(
        pair.change == "same" for pair in evidence.pairs)


class _Evidence:
    """A module's live functions, classes and values beside a text of it.

    Of definitions and literals it is known what they make, so only these are compared. Left out
    are names that the module's own code assigns or deletes by `global`, or as an attribute: a
    counter may have any value.
    """

    def __init__(self, module, source, line=None):
        self.name, self.space, self.source = module.__name__, _space_of(module), source
        self.line = line        # where the top level stands, if it runs just now
        codes = [code for _, code in _code_paths([source.code])]
        # What the module's own code sets, so that nobody can tell what it ought to be.
        self.set_globals = {name for code in codes for name in _stored_names(code, "GLOBAL")}
        self.set_attributes = {name for code in codes for name in _stored_attributes(code)}
        self.found = {}         # path -> the sentence on what can't be told
        self.gone = []          # (path of a class or "", name) of definitions not in the text
        self.subs = {}          # id of the _Statement of a class -> pairs of its body
        self.pairs = self._look_at(source.statements, self.space, "", None)
        self._look_for_extras(source.names | self.set_globals)
        if type(self.space.get("__doc__")) is str and "__doc__" not in source.names:
            self.gone.append(("", "__doc__"))

    def _tell(self, path, how=""):
        """Note that a name is not what the file says; without `how` only a dry run lists it."""
        self.found[path] = how and "%s %s" % (path, how)

    def _look_at(self, statements, items, prefix, cls):
        """Return a _Pair for each statement, changed or not, of a module or a class."""
        counts = collections.Counter(name for each in statements for name in each.binds)
        lasts = _last_binders(statements)
        pairs = []
        for each in statements:
            is_done = self.line is None or each.end < self.line
            is_last = "*" not in counts and all(lasts[name] is each for name in each.binds)
            change = "same"
            if is_done and is_last and each.is_definition:
                live = items.get(_mangled(each.node.name, cls and cls.__name__), _MISSING)
                change = self._change_of_definition(
                    each, live, prefix, cls, counts[each.node.name] == 1)
            elif is_done and is_last:
                change = self._change(each, items, prefix, cls)
            pairs.append(_Pair(None, each, change))
        return pairs

    def _change(self, statement, items, prefix, cls):
        """Return what an import or an assignment needs: same or new."""
        if statement.kind in ("Import", "ImportFrom"):
            return "same" if statement.binds <= set(items) else "new"
        if statement.kind not in ("Assign", "AnnAssign") or statement.node.value is None or (
                cls is not None and not _is_plain_class(cls)):
            return "same"
        skips = self.set_globals if cls is None else self.set_attributes
        literals, change = _literals(statement.node), "same"
        for name in statement.binds:
            live = items.get(_mangled(name, cls and cls.__name__), _MISSING)
            if name in skips:
                continue
            if live is not _MISSING:
                if type(statement.node.value).__name__ == "Lambda" and not all(
                        _behaviour(each.__code__) in self.source.behaviours
                        for each in self._own_functions(live, "<lambda>")):
                    change = "new"
                if name in literals and _is_unlike(literals[name], live):
                    self._tell(prefix + name, "is %s, the file says %s" % (
                        shorten(repr(live), 40), shorten(repr(literals[name]), 40)))
            else:
                if statement.is_pure and len(statement.binds) == 1:
                    change = "new"
                self._tell(prefix + name, (
                    "" if change == "new" else "is not there, the file has it"))
        return change

    def _change_of_definition(self, statement, live, prefix, cls, is_only):
        """Return what a definition needs: same, new, live or class."""
        node = statement.node
        path = prefix + node.name
        if live is _MISSING:
            if node.name in self.set_globals:
                return "same"
            self._tell(path)
            return "new"
        if statement.kind == "ClassDef":
            if self._is_own(live, path):
                return self._change_of_class(statement, live, path)
            if not node.keywords and not node.bases and not node.decorator_list:
                self._tell(path, "is not the class of the file")
            return "same"
        own = self._own_functions(live, node.name)
        if _has_console_code(live):
            self._tell(path)
        elif not own and is_only and not node.decorator_list:
            self._tell(path, "is not the function of the file")
        codes = [_behaviour(code) for code in self.source.codes.get(path, ())]
        if all(_behaviour(each.__code__) in codes and (not is_only or _defaults_fit(each, node))
               for each in own):
            return "same"
        return "live" if is_only else "new"

    def _own_functions(self, value, name):
        """Return the functions of a name in a value that the file has made."""
        return [each for each in _functions_in(value) if each.__globals__ is self.space
                and each.__code__.co_name == name and _is_in_file(each.__code__, self.source)]

    def _is_own(self, value, path):
        """Tell whether a value was made by a definition that a file of the module had at a path."""
        if _is(value, type):
            return value.__qualname__ == path and _is_of(value, self.name)
        return any(each.__qualname__ == path
                   for each in self._own_functions(value, path.rpartition(".")[2]))

    def _change_of_class(self, statement, cls, path):
        """Look at what is in a class; note its parts that the file has no more."""
        pairs = self.subs[id(statement)] = self._look_at(
            statement.body, vars(cls), path + ".", cls)
        names = {_mangled(name, cls.__name__) for name in _bound_by(statement.body)}
        gone = [name for name, value in list(vars(cls).items()) if name not in names
                and not _is(value, type) and self._is_own(value, "%s.%s" % (path, name))]
        self.gone += [(path, name) for name in gone]
        if _is_plain_class(cls) and not statement.node.decorator_list:
            for name in _added_to_class(cls, names.union(gone, self.set_attributes)):
                is_typed = _has_console_code(vars(cls)[name])
                self._tell("%s.%s" % (path, name), "" if is_typed else "is not in the file")
            if not _bases_fit(statement.node, self.space, cls):
                self._tell(path, "has other base classes than the file says")
        is_same = not gone and all(pair.change == "same" for pair in pairs)
        return "same" if is_same else "class"

    def _look_for_extras(self, names):
        """Note the names of the module that no statement of the file binds."""
        is_clear = "*" not in names and _INDIRECT.isdisjoint(self.source.code.co_names)
        for name, value in list(self.space.items()):
            if name in names or not _is(name, str) or name.startswith("__") or (
                    _is(value, types.ModuleType)):
                continue
            if _has_console_code(value):
                self._tell(name)
            elif is_clear:
                made_in = getattr(value, "__module__", None)
                if made_in == self.name and self._is_own(value, name):
                    self.gone.append(("", name))
                elif made_in != __name__:
                    # What this file has made, we have put there.
                    self._tell(name, "is not in the file")


def _is_plain_class(cls):
    """Tell whether the attributes of a class are what its statements have bound."""
    import abc
    return type(cls) in (type, abc.ABCMeta) and not issubclass(cls, tuple) and (
        {"__dataclass_fields__", "__attrs_attrs__"}.isdisjoint(vars(cls)))


def _bases_fit(node, space, cls):
    """Tell whether a class may well be what a class statement makes of its base classes."""
    bases = []
    for each in node.bases:
        if type(each).__name__ == "Attribute":
            # A class of another module, as in `class C(m.Base)`.
            names = _space_of(space.get(getattr(each.value, "id", None)))
            bases.append(names.get(each.attr))
        else:
            bases.append(space.get(getattr(each, "id", None)))
    if not all(_is(each, type) for each in bases):
        return True
    # 3.12: what has type parameters gets typing.Generic too.
    said, live = [[id(each) for each in some if each is not object and each.__module__ != "typing"]
                  for some in (bases, cls.__bases__)]
    return said == live


def _literals(node):
    """Return {name: value} of the literals that an assignment gives to names."""
    value, found = _literal(node.value), {}
    for target in getattr(node, "targets", None) or [node.target]:
        if type(target).__name__ == "Name":
            found[target.id] = value
        elif type(target).__name__ == "Tuple" and _is(value, (tuple, list)) and (
                len(value) == len(target.elts)):
            found.update((each.id, item) for each, item in zip(target.elts, value)
                         if type(each).__name__ == "Name")
    return found


def _is_unlike(literal, live):
    """Tell whether a live value is surely not what a literal gives."""
    try:
        # Only what can't be changed is compared: a list or dict is there to be changed.
        hash(literal)
    except TypeError:
        return False
    # In this order: _typed() is for constants only.
    return literal is not _MISSING and (
        type(live) is not type(literal) or _typed(live) != _typed(literal))


def _defaults_fit(function, node):
    """Tell whether a live function may well have the defaults of a `def`."""
    fitting = _kept_defaults(None, node, function)
    return fitting.keys() == _default_nodes(node).keys() == _live_defaults(function).keys()


def _added_to_class(cls, known):
    """Yield the attributes that surely no statement and no method has put on a class."""
    known = known.union(_CLASS_SKIPS, _stored_by_methods(cls))
    if "setattr" in known or any("__init_subclass__" in vars(base) for base in cls.__mro__[1:-1]):
        return
    for name, value in vars(cls).items():
        if name not in known and not name.startswith("__") and not isinstance(value, _SLOT_TYPES):
            yield name


def _stored_by_methods(cls):
    """Return the names that a class's methods, or `__set_name__` of its descriptors, may set."""
    sources = _own_bases(cls) + [
        getattr(type(value), "__set_name__", None) for value in vars(cls).values()]
    codes = [function.__code__ for each in sources for function in _functions_in(each)]
    return set().union(*[_stored_attributes(code) for _, code in _code_paths(codes)])


# --- Journal: the only thing that undoes ---
# Whoever changes the program writes through it: journal.put(_entry(space, "RATE"), 3). Before code
# of the program runs, what that may write to is kept: journal.keep(...), keep_content(a_list). A
# failure calls undo(), and all is as before. A success calls seal(), which looks at what has become
# of all that was kept; the journal then stays in the history, and its undo() leaves alone what
# others have written meanwhile. The lock of transactions guards it.

class _Journal:
    """The changes of one transaction, made in place, each with what takes it back.

        a failure    undo(): all is as before
        a success    seal(); later perhaps undo(), which leaves alone what others have changed since
    """

    def __init__(self):
        self._entries = []      # callables, the oldest first
        self.touched = set()    # (id of what is changed, name): whether a newer change covers it
        self._kept = {}         # id -> (container, its content before), to copy each once
        self._kept_slots = set()    # keys of the slots that keep() was called for
        self._unsealed = []     # callables to call when the transaction has succeeded

    def put(self, slot, value):
        """Write `value` to a slot; undo restores it if it is still ours."""
        read, write, key = slot
        before = read()
        if before is not value:
            if key not in self._kept_slots:
                # Else what was there before anybody wrote is put back.
                self.on_undo(lambda: _is_same(read(), value) and write(before), key)
            write(value)

    def keep(self, slot):
        """Have undo put back what is in a slot now, whoever writes to it meanwhile."""
        read, write, key = slot

        def restore(before, *after):
            if read() is not before and (not after or _is_same(read(), after[0])):
                write(before)
        if key not in self._kept_slots:
            self._kept_slots.add(key)
            self._keep(read, restore, key)

    def keep_content(self, container):
        """Have undo put back what a container holds now, or, once sealed, what differs then."""
        if id(container) not in self._kept:
            self._kept[id(container)] = container, self._keep(
                functools.partial(_content, container),
                functools.partial(_restore_container, container))

    def keeps(self, container):
        """Tell whether undo puts back what a container held before."""
        return id(container) in self._kept

    def _keep(self, read, restore, key=None):
        """Have undo call `restore` with what is read now and, once sealed, what is read then."""
        before, after = read(), []

        def seal():
            after.append(read())
            if key is not None and after[0] is not before:
                self.touched.add(key)
        self._entries.append(lambda: restore(before, *after))
        self._unsealed.append(seal)
        return before

    def on_undo(self, function, key=None):
        """Have undo call a function; `key` says what was changed, for newer changes."""
        self._entries.append(function)
        if key is not None:
            self.touched.add(key)

    def seal(self):
        """The transaction has succeeded: from now on undo leaves alone what others have changed."""
        for function in self._unsealed:
            function()
        self._unsealed, self._kept = [], {}

    def undo(self):
        """Take everything back, the newest first; return the errors, of which none stops it."""
        errors = []
        while self._entries:
            try:
                self._entries.pop()()
            except Exception as exc:
                errors.append(exc)
        return errors


def _is_same(a, b):
    """Tell whether two values are one; PyPy makes a new tuple each time __bases__ is read."""
    return a is b or IS_PYPY and type(a) is type(b) is tuple and a == b


def _gained(before, after, key=id):
    """Return (the items that a list has gained, those that it had); `key` tells them apart."""
    left, news, olds = collections.Counter(map(key, before)), [], []
    for item in after:
        (olds if left[key(item)] > 0 else news).append(item)
        left[key(item)] -= 1
    return news, olds


# A slot is a place for the journal, (read, write, key): a name in a namespace, an attribute, the
# cell of a closure. What is not there reads as _MISSING. Two changes with one key meet.

def _entry(mapping, key):
    """The place of a key in a namespace or another dict."""
    def write(value):
        if value is _MISSING:
            dict.pop(mapping, key, None)
        else:
            dict.__setitem__(mapping, key, value)
    return lambda: dict.get(mapping, key, _MISSING), write, (id(mapping), key)


def _attribute(obj, name):
    """The place of an attribute of a function, a class or an instance, also in a slot."""
    # type's own methods, because enums refuse theirs; object's, because of frozen dataclasses.
    is_class = isinstance(obj, type)
    kind = type if is_class else object

    def read():
        if is_class and name != "__bases__":
            # What the class has itself, not what it inherits.
            return vars(obj).get(name, _MISSING)
        try:
            return kind.__getattribute__(obj, name)
        except AttributeError:
            return _MISSING

    def write(value):
        if value is _MISSING:
            kind.__delattr__(obj, name)
        else:
            kind.__setattr__(obj, name, value)
    return read, write, (id(obj), name)


def _annotations(function):
    """A function's annotations; on 3.14 what will make them, as they may not be evaluable yet."""
    def write(value):
        setattr(function, "__annotate__" if callable(value) else "__annotations__", value)
    return (lambda: getattr(function, "__annotate__", None) or function.__annotations__, write,
            (id(function), "__annotations__"))


def _cell(cell):
    """The place of a variable of a closure."""
    return lambda: _cell_value(cell), functools.partial(_set_cell, cell), (id(cell), "")


def _cell_value(cell):
    """Return the variable of a closure; _MISSING before it is assigned, or after `del`."""
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _set_cell(cell, value):
    """Write to the variable of a closure."""
    if value is _MISSING:
        del cell.cell_contents  # novm; 3.7: it can be assigned too, but not before
        return
    content = None

    def setter(value):
        nonlocal content
        content = value
    # 3.6: only a function over the cell can write it.
    types.FunctionType(setter.__code__, globals(), "setter", None, (cell,))(value)


# --- Apply: the order of the import system, one pair after the other ---
# A transaction, from top to bottom:
#   _visit_all     the modules in the order in which a fresh process would import them; for each
#     _swap        its live functions get the code that the new file has for them (_Successors)
#     _apply_pair  its statements in file order, each by its change:
#         same, moved, body    nothing runs; but the body of a class is gone through likewise
#         def                  the old function gets the default or annotation that changed; the
#                              decorators are called again, on it, where they are others
#         class                the class's own statements that changed, one by one; or the whole
#                              statement, folded into the old class, where its kind asks for that
#         value, new, again    the statement runs, beside the module; what it defined is folded
#                              into what has the name (fold), and the name is bound then
#         lost                 somebody took the definition away: it is bound again
#     follow       what was made of what changed, also in other modules (_Readers)
#   _finish        names that are gone go; instances, closures and containers follow; hooks; report
# Whatever is written goes through the journal, by put(); before code of the program runs, all
# that it may reach is noted there too, by snapshot(). So an exception takes all of it back.

class _Apply:
    """One transaction: a reload of several modules, or a patch."""

    def __init__(self, report, edits=(), everything=False):
        self.report, self.edits, self.everything = report, edits, everything
        self.journal = _Journal()       # all that is written, with what takes it back
        self.put = self.journal.put
        self.by_name = {edit.name: edit for edit in edits}
        self.is_patch = False           # every new object counts as made by this transaction then
        # Whose turn has come: names of modules, (id of a class, name) of the `def`s of one name.
        self.started = set()
        self.ordered = []               # the edits in the order in which they were applied
        self.functions = None           # id of a namespace -> its functions; see _live_functions
        self.known = None               # id -> function or class that was alive before; see _learn
        self.folded = {}                # id of a new object -> (new, what stands for it now)
        self.moves = []                 # (old class, new class, reason): instances go over
        self.fills = []                 # (class, attribute, what makes a value, reason if none)
        self.afterwards = []            # callables for the end of a success
        self.old_codes = {}             # id of a code that was replaced -> (path, code)
        self.stuck = collections.Counter()      # (name, reason) -> functions left on old code
        self.called = []                # titles of statements that had called code of libraries
        self.closures = {}              # id -> live closure that can't take its new code
        self.classes = {}               # id -> (class that changed, its bases, its names before)
        self.readers = _Readers(self)   # what was made of what changed
        self.unbuilt = []               # pydantic's models whose validators are another class's
        self.refielded = {}             # id -> class with other fields: who copies them follows
        self.recalled = {}              # id -> class whose call is another: only functions copy it

    flask_apps = _once(lambda each: _flask_apps())      # it looks through the heap

    def patch(self, old, new):
        """Fold `new` into `old`; both go on living."""
        self.is_patch, self.known = True, {}
        try:
            (self.fold_class if isinstance(old, type) else self.fold_function)(old, new)
            if self.moves:
                raise TypeError("can't patch %r in place: %s; define a new class instead"
                                % (old.__qualname__, self.moves[0][2]))
            self._reach_what_lives()
        except BaseException:
            self.journal.undo()
            raise
        self.journal.seal()

    def foretell(self):
        """Fill the report with what a commit would do, and with what is in no file."""
        for edit in self.edits:
            evidence = _Evidence(edit.module, edit.old or edit.new, edit.line)
            runs = _bound_by(pair.new for pair in edit.pairs
                             if pair.new and pair.change not in _LEFT_ALONE)
            self.report.add("unsaved", edit.name, set(evidence.found) - runs)
            self.report.unsaved.sort()
            edit.pairs = _with_lost(edit)
            self._report_names(edit)
            self.readers.report_readers(edit, _bound_by(
                pair.new for pair in edit.pairs if pair.new and pair.change in _VALUES
                and not self._is_kept_out(edit, pair.new)))
        self._report_stuck()

    def commit(self):
        """Do it all; after an exception everything is as before and ReloadError is raised."""
        import linecache
        modules = dict(sys.modules)
        # Or a traceback would show lines of the old file.
        for edit in self.edits:
            read, write, _ = _entry(linecache.cache, edit.path)
            self.journal.on_undo(functools.partial(write, read()))
            write(_MISSING)
            # 3.13: or pdb would say of the file that its code is stale.
            pdb_class = getattr(sys.modules.get("pdb"), "Pdb", None)
            getattr(pdb_class, "_file_mtime_table", {}).pop(edit.path, None)
        # Any code may write these two without naming them.
        self.journal.keep_content(os.environ)
        self.journal.keep_content(sys.path)
        try:
            self._visit_all()
            self._finish()
        except BaseException as exc:
            errors = self.journal.undo()
            _forget_new_modules(modules)
            if not isinstance(exc, (Exception, SystemExit)):
                raise
            raise ReloadError("%s: %s; everything was put back%s%s" % (
                type(exc).__name__, exc, " except for %r" % (errors,) if errors else "",
                ", but what these did elsewhere can't be seen: " + ", ".join(self.called)
                if self.called else "")) from exc
        for edit in self.edits:
            put_back = _entry(HOT.known, edit.name)[1]
            self.journal.on_undo(functools.partial(put_back, edit.was or _MISSING))
            HOT.known[edit.name] = _Known(
                weakref.ref(edit.module), edit.path, edit.text, edit.stamp)
        self.journal.seal()

    # The order. A fresh process runs the statements of a module one after the other; at an import
    # it first runs the module that this leads to, as far as nobody has begun with it. So it is done
    # here with the pairs: _visit() yields the names of modules at the places of their imports, and
    # a stack of such generators stands for the imports that are under way. Modules that did not
    # change have no pairs, but lead on to others that did.

    def _visit_all(self):
        """Apply each edit when an import of the whole program would come to its module."""
        if len(self.edits) > 1:
            names = list(sys.modules)
            tops = dict.fromkeys(name.partition(".")[0] for name in names)
            names = list(tops) + names
        else:
            names = list(self.by_name)
        # Not recursive: a thousand modules may import each other.
        stack = [iter(names)]
        while stack:
            for name in stack[-1]:
                if name not in self.started:
                    self.started.add(name)
                    stack.append(self._visit(name))
                    break
            else:
                stack.pop()

    def _visit(self, name):
        """Apply the edit of a module; yield the names of those that come before it, or within."""
        edit = self.by_name.get(name)
        yield from self._apply(edit) if edit else _led_to(_imports_of_unchanged(name))

    def _apply(self, edit):
        """Bring a module up to date; yield the modules that it imports, each at its place."""
        edit.before, edit.pairs = dict(edit.space), _with_lost(edit)
        scope = _Scope(edit)
        later = self._swap(edit)
        for name in _ANNOTATIONS:
            self.journal.keep(_entry(edit.space, name))
        if "__annotate__" in edit.space:
            # Only there because somebody has read them: they are made anew when read.
            edit.space.pop("__annotations__", None)
        for pair in edit.pairs:
            if pair.new is not None:
                if len(self.edits) > 1:
                    yield from _led_to(_imports_of([pair.new.node], edit.space))
                self._apply_pair(scope, pair)
        # What a later statement was to bind anew, and did not, as its branch was not taken.
        edit.space.update((name, edit.held[name]) for name in edit.held if name not in edit.space)
        self._annotate(edit)
        for function, found in later:
            self._swap_function(function, found)
        self._run_for_closures(scope, edit.pairs)
        self._retire_gone(scope, edit.pairs)
        self.readers.follow(edit)
        self.ordered.append(edit)

    def _annotate(self, edit):
        """3.14: make of the annotations that each statement brought one function, as imports do.

        Those that ran have left the numbers of what they came to, from 0 on; the others are
        those that the module had come to, counted in its old text.
        """
        maker = next(filter(_makes_annotations, _nested_codes(edit.new.fresh)), None)
        for name in _ANNOTATIONS[0 if maker else 1:3]:
            edit.space.pop(name, None)
        if maker is None:
            return
        statements = edit.old.statements if edit.old else []
        olds = dict(zip(map(id, statements), _annotation_numbers(statements)))
        before, found = edit.before.get("__conditional_annotations__", ()), set()
        for pair, numbers in zip(edit.pairs, _annotation_numbers(edit.new.statements)):
            came_to = edit.annotated.get(id(pair.new))
            if came_to is None:
                came_to = [k for k, old in enumerate(olds.get(id(pair.old), ())) if old in before]
            found.update(numbers[k] for k in came_to if k < len(numbers))
        edit.space.update(__annotate__=types.FunctionType(maker, edit.space),
                          __conditional_annotations__=found)

    def _apply_pair(self, scope, pair):
        """Do with one statement what its change asks for."""
        new, is_left = pair.new, pair.change in _LEFT_ALONE
        runs = not is_left or self.everything
        if runs and scope.cls is None and self._is_kept_out(scope.edit, new):
            return
        if is_left and runs:
            self._run(scope, pair)
        elif new.kind == "ClassDef" and pair.change in ("moved", "body", "class"):
            self._apply_class(scope, pair)
        elif is_left:
            self._note_body(scope, pair)
        elif pair.change == "live":
            self._define(scope, pair)
        elif new.is_function and scope.cls is not None and scope.count(new.node.name) > 1:
            self._run_group(scope, new.node.name)
        elif pair.change == "def":
            self._apply_def(scope, pair)
        else:
            self._run(scope, pair)

    def _is_kept_out(self, edit, statement):
        """Tell whether a statement would start the script, or the loop at its top level, again."""
        return statement.is_main_guard or not statement.is_harmless and (
            edit.is_not_reached(statement))

    # Functions. All live functions of a module get their new code when its turn comes, wherever
    # somebody holds them: then what its statements call is new, and what only has another body
    # is done. Three kinds wait. One whose code names a global that the module has not got yet: for
    # the end of the module, or another thread would miss the name. One whose `def` has another
    # head: for its own turn, to get code and defaults at once. One whose code uses more variables
    # of its closure: for the statement that made it, which runs again; else it is named as stale.

    def _swap(self, edit):
        """Give the live functions of a module their new code; return those that must wait.

        Their new code names a global that the module will have only when its statements have run.
        """
        successors, later = _Successors(edit), []
        absent = _bound_by(edit.new.statements).difference(edit.space)
        named = edit.old and successors.named_functions()
        for function in self._live_functions(edit) if named is None else named:
            found = successors.of(function)
            if found is None:
                continue
            if found.code is None:
                self.stuck[found.path, found.reason] += 1
            elif any(absent.intersection(code.co_names)
                     for _, code in _code_paths([found.code])):
                later.append((function, found))
            else:
                self._swap_function(function, found)
        return later

    def _live_functions(self, edit):
        """Return the functions of a module that lived when all began; one pass for all edits."""
        if self.functions is None:
            self.functions = collections.defaultdict(list)
            for each in _functions_of([each.space for each in self.edits]):
                self.functions[id(each.__globals__)].append(each)
        return self.functions[id(edit.space)]

    def _swap_function(self, function, found):
        """Give a function the code that the new file has for it, as far as its cells allow."""
        old, new = function.__code__, found.code
        # Code fits where it finds the same variables in the function's closure, in their order;
        # where it needs fewer, the old function calls a new one, which has those.
        if old.co_freevars == new.co_freevars:
            try:
                defaults = _new_defaults(found, function) if found.is_inner else (
                    function.__defaults__, function.__kwdefaults__)
            except ValueError:
                self.stuck[found.path, "a new default of its parameters is known only where it is "
                                       "defined"] += 1
                return
            if function.__doc__ == _doc_of(old):
                self.put(_attribute(function, "__doc__"), _doc_of(new))
                self._follow_doc(function, found.path, _doc_of(old))
            self._put_code(function, (new,) + defaults, found.path, found.is_changed)
            if found.is_changed:
                self._clear_caches(function, found.path)
        elif set(new.co_freevars) <= set(old.co_freevars):
            cells = dict(zip(old.co_freevars, function.__closure__))
            self.forward(function, _function_like(
                function, new, [cells[name] for name in new.co_freevars]))
        else:
            self.closures[id(function)] = function, found.path, "the variables of the closure " \
                "changed from (%s) to (%s)" % (
                    ", ".join(old.co_freevars), ", ".join(new.co_freevars))

    def _put_code(self, function, state, path=None, is_changed=True):
        """Give a function its code and defaults, with what takes that back if it is still ours."""
        before = function.__code__, function.__defaults__, function.__kwdefaults__
        if (before[0].co_flags ^ state[0].co_flags) & _CODE_KINDS:
            _forget_kinds()
            self.journal.on_undo(_forget_kinds)
        if is_changed:
            self.old_codes[id(before[0])] = path or function.__qualname__, before[0]
        self.journal.on_undo(lambda: function.__code__ is state[0] and _swap(function, *before),
                             (id(function), "__code__"))
        _swap(function, *state)

    def _follow_doc(self, function, path, before):
        """Put the new docstring on what wraps a function and has copied the old one: a property."""
        value = _at_path(function.__globals__, path.split("."))
        for each in [value, *_wrapped_by(value)]:
            slot = _attribute(each, "__doc__")
            if _holds(each, function) and _is_plain_equal(slot[0](), before):
                self.put(slot, function.__doc__)

    def _clear_caches(self, function, path):
        """Have an lru_cache around a changed function forget its results, once all has succeeded.
        """
        value = _unwrapped(_at_path(function.__globals__, path.split(".")))
        if type(value) in (types.FunctionType, _LRU_CACHE) and hasattr(value, "cache_clear") and (
                getattr(value, "__wrapped__", None) is function):
            self.afterwards.append(value.cache_clear)

    def _run_for_closures(self, scope, pairs):
        """Run the statements that made functions which can't take their new code.

        Such as the call of a factory, or a method that uses super() for the first time.
        """
        for pair in pairs if self.closures else ():
            inner = pair.new and scope.of_class(pair)
            if inner:
                self._run_for_closures(inner, scope.edit.sub_pairs(pair))
            elif pair.change in _LEFT_ALONE and not pair.new.is_main_guard and (
                    scope.cls or pair.new.names.calls | pair.new.names.heads):
                held = {id(each) for name in pair.new.binds
                        for each in _functions_in(scope.get(name))} & set(self.closures)
                if held:
                    self._apply_pair(scope, pair._replace(change="again"))
                for key in held:
                    del self.closures[key]

    # Definitions. Whoever holds a function shall have the new one, so the old object stays:
    #   its decorators                                its `def` with another head
    #   are alike, and known to look at no head       sets what differs: defaults, annotations
    #   are others, or may look at it                 ... and they are called again, on this object
    #   are its first ones, or it has none now        runs; the new object is folded into the old
    # Of defaults only those are evaluated whose text is another one: `cache={}` may be a memo.

    def _apply_def(self, scope, pair):
        """Do what a changed head of a function asks for, by the table above.

        The head: decorators, parameters, defaults, annotations.
        """
        old, new = pair.old.node, pair.new.node
        if pair.old.decorator_dump == pair.new.decorator_dump and _is_transparent(new) and (
                scope.last_binder(new.name) is pair.new):
            self._define(scope, pair)
        elif old.decorator_list and new.decorator_list:
            self._redecorate(scope, pair)
        else:
            self._take_back(scope, pair)
            self._run(scope, pair)

    def _define(self, scope, pair):
        """Give the old function what changed in its head; no decorator is called."""
        raw = self._raw(scope, pair)
        self.snapshot(scope.edit, pair.new)
        new = raw and self._evaluate(scope, pair, raw)
        if new is None or new.__code__.co_freevars != raw.__code__.co_freevars:
            self._run(scope, pair)
            return
        new.__dict__.update(vars(raw))
        # A package may have set them.
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(new, name, getattr(raw, name))
        doc, path = raw.__doc__, scope.prefix + pair.new.node.name
        self.fold_function(raw, new)
        self._follow_doc(raw, path, doc)
        self._clear_caches(raw, path)
        if pair.old is not None and _signature_key(pair.old.node) != _signature_key(pair.new.node):
            # Whoever copied the signature has to follow, such as FastAPI's handlers of a
            # dependency.
            self.refielded[id(raw)] = raw
            if scope.cls is not None and pair.new.node.name in ("__init__", "__call__"):
                self.recalled[id(scope.cls)] = scope.cls

    def _evaluate(self, scope, pair, raw):
        """Make the function of a `def` anew, without decorators, with the defaults that stay."""
        kept = _kept_defaults(pair.old and pair.old.node, pair.new.node, raw)
        new = scope.evaluate(pair.new.node, kept)
        new.__defaults__, new.__kwdefaults__ = _as_defaults(
            new.__code__, dict(_live_defaults(new), **kept))
        return new

    def _raw(self, scope, pair):
        """Return the live function of a `def`, below whatever its decorators have made of it."""
        name, space = (pair.new or pair.old).node.name, scope.edit.space
        value, line = scope.get(name), (pair.old or pair.new).start + 1
        code = pair.new and scope.edit.new.code_of(pair.new.node)
        if value is _MISSING:
            return None
        alike = []
        for source in (_functions_in(value), self._live_functions(scope.edit)):
            found = [each for each in source if each.__code__.co_name == name
                     and each.__globals__ is space and each.__qualname__ == scope.prefix + name]
            exact = [each for each in found if each.__code__ is code] or [
                each for each in found if each.__code__.co_firstlineno == line
                and each.__code__ not in scope.edit.new.codes_at(name, line)]
            if exact:
                return exact[0]
            alike += found
        return alike[0] if alike and scope.count(name) == 1 else None

    def _made_by(self, scope, pair):
        """Return what a `def` has made: what has its name, unless that is a namesake's."""
        name, value = pair.new.node.name, scope.get(pair.new.node.name)
        if not pair.new.is_function or scope.count(name) == 1 and pair.change != "again":
            return value
        raw = self._raw(scope, pair) if pair.change != "new" else None
        if raw is None:
            return _MISSING
        return value if any(each is raw for each in _functions_in(value)) else raw

    def _redecorate(self, scope, pair):
        """Call the decorators again, on the old function, whose attributes were theirs."""
        raw, node = self._raw(scope, pair), pair.new.node
        old = self._made_by(scope, pair)
        if raw is None:
            self._run(scope, pair)
            return
        self._learn()
        reached = self.snapshot(scope.edit, pair.new, pair.old)

        def decorate():
            self.fold_function(raw, self._evaluate(scope, pair, raw))
            value = scope.decorate(node, raw)
            if hasattr(type(value), "__maybe_evaluate__"):
                # Celery's promise of a task: have it made now.
                value.__maybe_evaluate__()
            return value
        places = _Registrations(self, reached, _ids([old, raw]))
        value = places.renew(decorate)
        if pair.old is not None and not places.taken and (
                pair.old.decorator_dump != pair.new.decorator_dump) and not (
                    _is_transparent(node)) or places.returned and _lost_decorators(pair):
            self._note_not_retired(scope, pair.new)
        # What they return is `raw` itself, or is made of it, or it is what the name had before.
        if value is not raw:
            value = self._fold_made(old, value, reached)
        self._bind(scope, node.name, value, pair.new)

    def _fold_made(self, old, value, reached):
        """Fold what decorators returned: it is new, unless it could be reached before."""
        value = self.current(value)
        if id(value) in self.known or any(each is value for each in reached) or _holds(value, old):
            return value
        return self._fold_by_rule(old, value)

    def _note_not_retired(self, scope, statement):
        """Say that an old registration may go on beside the new one."""
        note = "%s: what its old decorator registered may be there still" % scope.title(
            statement.node.name)
        if note not in self.report.notes:
            self.report.notes.append(note)

    def _run_group(self, scope, name):
        """Run all `def`s of one name in a class, such as a property and its setter."""
        if (id(scope.cls), name) in self.started:
            return
        self.started.add((id(scope.cls), name))
        nodes = [each.node for each in scope.statements if each.is_function and name in each.binds
                 and not _is_overload(each.node)]
        self._learn()
        for key, value in scope.execute(nodes, self).items():
            self._bind(scope, key, self.fold(vars(scope.cls).get(key, _MISSING), value), None)

    # Classes. The statements of a class body are applied one by one to the class that lives, as
    # those of a module are: SQLAlchemy refuses a second class for a table, and a registry would
    # hold both. They run in a namespace that finds what the class has, and the result is set as a
    # program would set it. The whole statement runs only where something else than its body has
    # changed, or where the class is of a kind that was made of all fields at once (_CLASS_KINDS).

    def _apply_class(self, scope, pair):
        """Apply a class that changed: its statements one by one, or the whole where it must be."""
        inner, is_changed = scope.of_class(pair), pair.change == "class"
        pairs = scope.edit.sub_pairs(pair) if inner else []
        if is_changed and (inner is None or _needs_its_statement(inner.cls, pairs) or (
                pair.old is not None and _class_head(pair.old) != _class_head(pair.new))):
            self._take_back(scope, pair)
            self._run(scope, pair)
        elif inner is not None:
            self._apply_body(inner, pair, pairs)

    def _apply_body(self, scope, pair, pairs):
        """Apply the statements of a class body one by one."""
        cls = scope.cls
        self._put_place(scope.edit, cls, pair)
        if pair.change != "moved":
            self._note_class(cls)
        before = dict(vars(cls))
        for each in pairs:
            if each.new is not None:
                self._apply_pair(scope, each)
                self._note_init(scope, each)
        if pair.change == "class":
            self._finish_class(scope, pairs, before)

    def _finish_class(self, scope, pairs, before):
        """See to what a class statement does besides its body, and to who reads its attributes."""
        cls, edit = scope.cls, scope.edit
        self._retire_gone(scope, pairs)
        names = _bound_by(each.new for each in pairs if each.change in _VALUES)
        self.readers.follow_pure(edit, scope.statements, cls, dict(edit.space, **before),
                                 dict(edit.space, **vars(cls)), names)
        active = [each for each in pairs if each.change not in _LEFT_ALONE]
        if any(each and each.kind == "AnnAssign" for pair in active for each in pair[:2]):
            scope.annotate(self)
        base = next((base for base in cls.__mro__[1:-1] if "__init_subclass__" in vars(base)), None)
        if base is not None and type(cls).__setattr__ is type.__setattr__ and (
                base.__module__ != "typing" and any(
                    each.change in ("new", "gone") for each in pairs)):
            self.report.notes.append("%s: %s.__init_subclass__ has not seen what is new in it" % (
                scope.title(""), base.__qualname__))

    def _note_class(self, cls):
        """Note a class before it changes: others may have to learn of it, also after an undo."""
        if not self.classes:
            self.journal.on_undo(_forget_subclasses)
        self.classes.setdefault(id(cls), (cls, cls.__bases__, set(vars(cls))))

    def _tell_of_classes(self):
        """Find anew what classes are abstract, and let be asked anew what is a subclass of what."""
        for cls, _, _ in self.classes.values():
            if hasattr(cls, "__abstractmethods__"):
                self._update_abstract(cls)
        # It looks through the heap: not where only methods have other bodies.
        if any((cls.__bases__, set(vars(cls))) != (bases, names)
               for cls, bases, names in self.classes.values()):
            _forget_subclasses()

    def _put_place(self, edit, cls, pair):
        """3.13: put on a class what it knows of its text: its line, and what methods set on self.
        """
        code = edit.new.code_of(pair.new.node) if "__firstlineno__" in vars(cls) else None
        if code is not None:
            self.put(_attribute(cls, "__firstlineno__"), code.co_firstlineno)
            self.put(_attribute(cls, "__static_attributes__"), _static_attributes(code))

    def _note_body(self, scope, pair):
        """Do nothing for a body that changed, as _swap has done it; unless it was typed over."""
        if pair.change == "body" and pair.new.is_function:
            value = scope.get(pair.new.node.name)
            if type(value) is types.FunctionType and not pair.new.node.decorator_list and (
                    not _is_in_file(value.__code__, scope.edit.new)) and (
                    scope.cls is None or _is_from_console(value)):
                self._run(scope, pair)

    def _note_init(self, scope, pair):
        """Note what a new __init__ sets: live instances get the literals, the rest is named."""
        method = getattr(pair.new.node, "name", "")
        if method not in _INITS or pair.change in ("same", "moved", "live"):
            return
        olds = _attributes_set(pair.old.node) if pair.old else ()
        for name, node in _attributes_set(pair.new.node).items():
            if name not in olds:
                name = scope.name_of(name)
                self.fills.append((scope.cls, name, functools.partial(_fresh_value, node), (
                    "existing instances lack %s, which %s sets now" % (name, method))))

    def _follow_fields(self):
        """Run again what copied the fields or the signature of something that has others now.

        Such as dataclasses below it, models with fields of its type, and handlers that take it, in
        all modules of the program.
        """
        edits, done, size = {edit.name: edit for edit in self.ordered}, set(), 0
        while size < len(self.refielded):
            size = len(self.refielded)
            for name, known in list(HOT.known.items()):
                if name not in edits and self._are_refielded(list(_space_of(
                        known.module()).values())) and self.readers.source_of(name):
                    edits[name] = _unedited(name, known)
            for edit in list(edits.values()):
                for pair in edit.pairs:
                    is_new = pair.change in _LEFT_ALONE and id(pair.new) not in done and (
                        self._reads_refielded(edit, pair.new))
                    done.update([id(pair.new)] if is_new else ())
                    if is_new and not self._copies_fields(edit, pair.new):
                        # Who reads these has copied the fields too.
                        values = _values_of(edit.space, pair.new.binds)
                        self.refielded.update((id(each), each) for each in values if not _is(
                            each, _PLAIN_TYPES + _REGISTRIES + (tuple,)))
                    elif is_new:
                        self._rebuild_models()
                        self.report.add("followed", edit.name, [pair.new.node.name])
                        (self._redecorate if pair.new.is_function else self._run)(
                            _Scope(edit), pair)

    def _reads_refielded(self, edit, statement):
        """Tell whether a definition reads what has other fields, but not to call it."""
        if statement.kind == "Assign":
            return self._are_refielded(
                _values_of(edit.space, statement.names.reads - statement.names.calls))
        if not statement.is_definition:
            return False
        names, value = statement.names, edit.space.get(statement.node.name)
        if statement.is_function:
            bare = [each for each in statement.node.decorator_list if type(each).__name__ != "Call"]
            return self._are_refielded(_values_of(
                edit.space, names.reads - names.calls - _Names(bare).reads))
        return _is(value, type) and self._are_refielded(
            _values_of(edit.space, names.reads) + list(value.__mro__[1:]), is_called=False)

    def _copies_fields(self, edit, statement):
        """Tell whether a definition copies what it reads, as it is decorated or has fields."""
        return not _is_transparent(statement.node) if statement.is_function else (
            statement.is_definition and any(
                each.has_fields and each.fits(edit.space[statement.node.name])
                for each in _CLASS_KINDS))

    def _are_refielded(self, values, is_called=True):
        """Tell whether one of some values, or a base of it, is among `refielded`, or `recalled`."""
        return any(id(each) in self.refielded or is_called and id(each) in self.recalled
                   for value in values
                   for each in (value.__mro__ if _is(value, type) else (value,)))

    # Statements that run. They run beside the module, and what they bind is settled afterwards:
    # a new function or class goes into the old one of that name, other values are bound. Of a
    # statement whose names are read while it runs, as by a loop, the module is the namespace.

    def _run(self, scope, pair):
        """Execute a statement; what it defines goes into what has its names."""
        statement, edit = pair.new, scope.edit
        if statement.is_constant:
            self._put_docstring(scope, statement)
            return
        if any(_is_mapped(scope.cls, name) for name in statement.binds):
            self._note_mapped(scope, statement.binds)
            return
        reached = []
        if not statement.only_defines or pair.change == "lost":
            self._learn()
            reached = self.snapshot(edit, statement, pair.old)
        if pair.change == "lost" and self._bring_back(scope, statement):
            return
        before = {name: self._made_by(scope, pair) if statement.is_function else scope.get(name)
                  for name in statement.binds}
        if pair.change == "lost" or pair.change == "new" and statement.is_definition and (
                edit.had_imported(statement.node.name)):
            before = dict.fromkeys(before, _MISSING)
        is_again = statement.is_definition and (pair.old is not None or pair.change == "again")
        places = _Registrations(self, reached, _ids_of(before.values()) if is_again else set())
        bound = places.renew(lambda: scope.execute([statement.node], self, statement))
        if places.returned and _lost_decorators(pair):
            self._note_not_retired(scope, statement)
        if any(_is_foreign(edit.space.get(name, vars(builtins).get(name)))
               for name in statement.names.calls | statement.names.heads):
            self.called.append(statement.title)
        for value in bound.values() if scope.cls is not None else ():
            _give_column_its_type(scope, statement.node, value)
        if statement.is_definition:
            # What the definitions below it have made stays behind it.
            places.put_before(_ids_of(
                scope.get(each.node.name) for each in scope.statements
                if each.start > statement.start and getattr(each.node, "decorator_list", ())))
        for name in sorted(statement.binds):
            self._settle(scope, statement, name, before[name],
                         bound.pop(name, bound.pop(scope.name_of(name), _MISSING)))
        for name, value in bound.items() if scope.cls is not None else ():
            self._bind(scope, name, value, statement)

    def _note_mapped(self, scope, names):
        """Say of columns that they stay: a table can't take another one in place of them."""
        for name in sorted(names):
            self.report.notes.append("%s: SQLAlchemy has mapped it to its table; it stays as it is"
                                     % scope.title(name))

    def _put_docstring(self, scope, statement):
        """Put the docstring of a module or a class, which its first statement alone can be."""
        if statement is scope.statements[0]:
            space = {}
            exec(scope.edit.new.compile([statement.node]), space)
            scope.put(self, "__doc__", space.get("__doc__"))

    def _settle(self, scope, statement, name, old, new):
        """Give the name the object it had before, with the behaviour of the new one."""
        last = scope.last_binder(name)
        if new is _MISSING:
            return
        if last is not statement and not scope.edit.runs(last):
            # A later statement, which does not run again, has the last word.
            new = old
        elif last is not statement and scope.cls is None:
            # It will be settled by that one.
            scope.held[name] = new
            return
        elif old is not _MISSING:
            new = self.fold(old, new, statement)
        self._bind(scope, name, new, statement)

    def _bind(self, scope, name, value, statement):
        """Bind a name to what stands for its new value, if nothing below binds it again."""
        if statement is not None and statement.is_definition and (
                scope.last_binder(name) not in (None, statement)):
            # Of several definitions of one name, the last one has it.
            return
        scope.held.pop(name, None)
        scope.put(self, name, value)

    def _bring_back(self, scope, statement):
        """Bind what was lost, if one such is alive; else name what was made with it."""
        name, is_class = statement.node.name, statement.kind == "ClassDef"
        found = [each for each in self.known.values() if each.__qualname__ == name
                 and isinstance(each, type) == is_class
                 and each.__module__ == scope.edit.name and not _has_console_code(each)
                 and all(function.__globals__ is scope.edit.space
                         for function in _functions_in(each))]
        # Not a namesake, nor what a decorator may have made something else of.
        is_it = len(found) == 1 and (is_class or not statement.node.decorator_list and (
            found[0].__code__.co_firstlineno == statement.start + 1))
        if is_it:
            scope.put(self, name, found[0])
        elif statement.names.heads:
            self.readers.report_readers(scope.edit, {name})
        return is_it

    def _learn(self):
        """Note once the functions and classes that are alive: all others this transaction made."""
        if self.known is None:
            functions = [each for edit in self.edits for each in self._live_functions(edit)]
            self.known = {id(each): each for each in itertools.chain(functions, _all_classes())}

    # What the new text has no more. A definition that is gone is taken out of what its decorators
    # had put it into; its name, and those of values, go when the whole transaction is through, as
    # modules whose turn comes later may still use them.

    def _retire_gone(self, scope, pairs):
        """Take back the registrations of definitions that are gone; names go at the very end."""
        names = _bound_by(pair.new for pair in pairs if pair.new is not None)
        for pair in pairs:
            if pair.change == "gone" and pair.old.is_definition:
                self._retire(scope, pair, pairs)
        if scope.cls is not None:
            self._take_attributes(scope, pairs, names)

    def _take_back(self, scope, pair):
        """Take back what the decorators of a definition had registered, which has none any more.

        Where a statement uses what is defined, that may have put it there as well: it stays.
        """
        if pair.new.node.decorator_list or not _lost_decorators(pair):
            return
        name, outer = pair.new.node.name, scope.path.partition(".")[0]
        is_used = any(name in each.names.reads for each in scope.statements
                      if not each.is_definition)
        # In a module such as `R.append(C.m)`.
        if is_used or any(outer in each.names.reads and each.mentions({name})
                          for each in scope.edit.new.statements if not each.is_definition):
            self._note_not_retired(scope, pair.new)
        elif self._retire(scope, pair, [pair]):
            self.report.notes.append("%s: it was taken out of what its old decorator can have put "
                                     "it into" % scope.title(name))

    def _retire(self, scope, pair, pairs):
        """Take a definition out of what it had been put into; return whether it was found there."""
        name = pair.old.node.name
        raw = self._raw(scope, pair) if pair.old.is_function else None
        value = scope.get(name)
        if len([each for each in pairs if name in (each.old or each.new).binds]) > 1:
            # A namesake has the name.
            value = raw
        self._learn()
        reached = self.snapshot(scope.edit, *[
            each.old for each in pairs if each is pair or (
                each.old is not None and name in each.old.names.reads)])
        targets = _ids([value, raw, *_functions_in(value)])
        is_found = _Registrations(self, reached, targets).drop()
        if not is_found and not _is_transparent(pair.old.node):
            self._note_not_retired(scope, pair.old)
        return is_found

    def _take_attributes(self, scope, pairs, names):
        """Take away from a class what only statements that are gone had bound."""
        cls = scope.cls
        own = {_mangled(name, cls.__name__) for name in _bound_by(
            pair.old for pair in pairs if pair.old is not None)}
        kept = {_mangled(name, cls.__name__) for name in names}
        gone = [name for path, name in scope.edit.gone if path == scope.path]
        for name in sorted(own - kept) + gone:
            if _is_mapped(cls, name):
                self._note_mapped(scope, [name])
            elif name in vars(cls):
                self.put(_attribute(cls, name), _MISSING)
        if "__eq__" in own - kept and vars(cls).get("__hash__", 0) is None and (
                "__hash__" not in kept):
            # Python had added it to a class with __eq__ alone.
            self.put(_attribute(cls, "__hash__"), _MISSING)
        if not any(each.is_constant for each in scope.statements[:1]) and any(
                pair.change == "gone" and pair.old.is_constant for pair in pairs):
            self.put(_attribute(cls, "__doc__"), None)

    # Kinds: the new object's behaviour goes into the old one, by the first rule of _FOLD_RULES
    # that fits. Only what this transaction made is folded: an object that was alive before, and got
    # the name, as by `f = g`, is what it is. `folded` says which object stands for which, for those
    # who have got hold of the new one meanwhile: a registry, a closure, a base class.

    def fold(self, old, new, statement=None):
        """Return what shall stand where `new` stands now: `old`, changed in place, if possible."""
        if id(new) in self.folded:
            return self.folded[id(new)][1]
        if new is old or old is _MISSING or not self._is_fresh(new, statement) or (
                _holds(new, old) or _are_namesakes_apart(old, new) or (
                    _has_another_name(old, statement))):
            return new
        return self._fold_by_rule(old, new)

    def _fold_by_rule(self, old, new):
        """Fold by the first rule that fits; where none does, the new object takes the place."""
        for fits, update in _FOLD_RULES:
            if fits(old, new):
                return update(self, old, new)
        return new

    def stands_for(self, old, new):
        """Note that `old` has taken the place of `new`, which somebody may hold."""
        self.folded[id(new)] = (new, old)

    def current(self, value):
        """Return what stands for a value now."""
        return self.folded.get(id(value), (None, value))[1]

    def _is_fresh(self, value, statement, depth=3):
        """Tell whether a function, a class or what wraps it was made by this transaction."""
        if self.is_patch:
            return True
        if id(value) in (self.known or ()):
            return False
        if _is(value, type):
            return value.__flags__ & HEAP_TYPE != 0
        if type(value) is types.FunctionType:
            if any(value.__globals__ is edit.space for edit in self.edits):
                return not value.__code__.co_filename.startswith("<")
        elif statement is not None and statement.names.heads and _is_plain_instance(value):
            return True
        return depth > 0 and any(self._is_fresh(inner, statement, depth - 1)
                                 for inner in _wrapped_by(value))

    def fold_function(self, old, new, kept=None):
        """Give a function the behaviour of another one made from the same definition."""
        if not self.is_patch and old.__globals__ is new.__globals__ and (
                old.__code__.co_freevars != new.__code__.co_freevars):
            return self.forward(old, new)
        # First: what the new one wraps, or its cells, may hold it again.
        self.stands_for(old, new)
        if "registry" in vars(old) and "registry" in vars(new):
            self._keep_registered(new, dict(old.registry))
        attributes = {name: self.fold(vars(old).get(name, _MISSING), value)
                      for name, value in vars(new).items()}
        if old.__globals__ is new.__globals__ and (
                old.__code__.co_freevars == new.__code__.co_freevars):
            for cell, new_cell in zip(old.__closure__ or (), new.__closure__ or ()):
                value = self.fold(_cell_value(cell), _cell_value(new_cell))
                self.put(_cell(cell), value)
                if self.is_patch:
                    # `new` goes on living, and an undo gives it its own back.
                    self.put(_cell(new_cell), value)
                else:
                    _set_cell(new_cell, value)
            state = new.__code__, new.__defaults__, new.__kwdefaults__
        else:
            state = _forwarder(old, new)
            # Later, else _redirect makes `old` of this reference.
            self.afterwards.append(functools.partial(
                self.put, _entry(vars(old), "__wrapped__"), new))
        names = () if self.is_patch else ("__name__", "__qualname__", "__module__")
        for name in names + ("__doc__", "__type_params__"):
            if hasattr(new, name):
                self.put(_attribute(old, name), getattr(new, name))
        self.put(_annotations(old), _annotations(new)[0]())
        if attributes != vars(old):
            self.put(_attribute(old, "__dict__"), attributes)
        self._put_code(old, state, is_changed=_behaviour(old.__code__) != _behaviour(state[0]))
        return old

    def _keep_registered(self, new, registry):
        """singledispatch: implementations that other modules registered go on counting."""
        def register():
            for cls, function in registry.items():
                space = getattr(function, "__globals__", None)
                if cls not in new.registry and not any(space is edit.space for edit in self.edits):
                    new.register(cls, function)
        self.afterwards.append(register)

    def forward(self, old, new):
        """Let an old function call what the name is now: a callable of another kind."""
        self._put_code(old, _forwarder(old, new))
        self.put(_attribute(old, "__dict__"), dict(vars(old), __wrapped__=new))
        # It has the name now.
        self.stands_for(new, new)
        return new

    def replace(self, old, new, reason=None):
        """A class can't become what it is now: instances and references move to the new one."""
        kinds = ["class" if _is(each, type) else type(each).__name__ for each in (old, new)]
        if kinds == ["class", "class"]:
            reason = reason or _ANOTHER_CLASS
        self.moves.append((old, new, reason or "it was a %s and is a %s now" % tuple(kinds)))
        self.stands_for(new, new)
        return new

    def fold_class(self, old, new):
        """Give a class the attributes and bases of a new version of it."""
        self.stands_for(old, new)
        self._note_class(old)
        reason = self._obstacle(old, new)
        if reason is not None:
            return self.replace(old, new, reason)
        for function in _functions_in(new):
            for cell in function.__closure__ or ():
                if _cell_value(cell) is new:
                    # The __class__ that super() means.
                    self.put(_cell(cell), old)
        for kind in _CLASS_KINDS:
            if kind.fold and kind.fits(new):
                kind.fold(self, old, new)
        self._fold_attributes(old, new)
        return old

    def _update_abstract(self, cls):
        """Find anew which methods a class and those below it must still define."""
        for sub in _all_classes(cls):
            names = frozenset(name for base in sub.__mro__ for name in vars(base) if getattr(
                getattr(sub, name, None), "__isabstractmethod__", False))
            if names != getattr(sub, "__abstractmethods__", names):
                self.put(_attribute(sub, "__abstractmethods__"), names)

    def _obstacle(self, old, new):
        """Put the new bases on the old class; return a reason if it can't become the new one."""
        if self.current(type(new)) is not type(old):
            return "its metaclass changed from %s to %s" % (
                type(old).__name__, type(new).__name__)
        bases = tuple(map(self.current, new.__bases__))
        if _slots(old) != _slots(new):
            return "its %s changed" % (
                "__slots__" if bases == old.__bases__ else "base classes and their layout")
        try:
            if bases != old.__bases__:
                self.put(_attribute(old, "__bases__"), bases)
        except TypeError as exc:
            return "its base classes changed (%s)" % exc
        return None

    def _fold_attributes(self, old, new):
        """Merge two classes, name by name, as the statements of the two texts say.

        its statement is      the name
        new, another          gets the new value, folded into the old one where that can be
        unchanged             keeps what it holds, unless that can be folded
        gone                  goes, also what Python or a decorator had made of it
        in neither text       stays: the program has put it there
        """
        values, news = dict(vars(old)), dict(vars(new))
        skips = _CLASS_SKIPS - {"__slots__"} | {"__module__"}
        edit, pair = self._pair_of(new)
        kept = set() if pair is None or self.everything or pair.change == "again" else (
            _kept_class_names(edit, pair, old))
        for name, value in news.items():
            if name not in skips and not isinstance(value, _SLOT_TYPES):
                folded = self.fold(values.get(name, _MISSING), value)
                if not (name in kept and name in values and folded is value):
                    self.put(_attribute(old, name), folded)
        for name in set(values).difference(news, skips):
            if self.is_patch or _is_made_by_text(old, name, values[name], pair):
                if not isinstance(values[name], _SLOT_TYPES):
                    self.put(_attribute(old, name), _MISSING)
            elif pair and not _has_console_code(values[name]) and not (
                    _decorators(pair.old) <= _decorators(pair.new)) and name not in (
                    _stored_attributes(edit.new.fresh) | _stored_by_methods(old)):
                self.stuck["%s.%s" % (old.__qualname__, name), (
                    "it stays: whether a decorator that was taken away had put it there, or "
                    "something else, can't be told")] += len(_instances(old))

    def _pair_of(self, cls):
        """Return the (edit, pair) of the class statement that made a class, or twice None."""
        edit, found = self.by_name.get(cls.__module__), None
        pairs = edit.pairs if edit else ()
        for part in cls.__qualname__.split("."):
            found = {pair.new.node.name: pair for pair in pairs
                     if pair.new is not None and pair.new.kind == "ClassDef"}.get(part)
            if found is None or found.old is None or found.old.kind != "ClassDef":
                return None, None
            pairs = edit.sub_pairs(found)
        return edit, found

    def fold_enum(self, old, new):
        """Keep the members of an enum, add the new ones; _redirect sees to who holds those."""
        combinations = list(_combinations(old, new))
        olds = dict(old._member_map_)
        self.refielded[id(old)] = old
        for kept, member in combinations:
            # A combination such as A | B gets a name.
            olds.setdefault(member._name_, kept)
        for name, member in new._member_map_.items():
            kept = olds.get(name)
            if id(member) in self.folded:
                # An alias of a member that was folded.
                continue
            if kept is not None and _same_payload(kept, member):
                self._fold_member(kept, member)
            else:
                if kept is not None:
                    self.stuck["%s.%s" % (old.__qualname__, name), (
                        "a member of an enum mixed with a data type can't change its value; "
                        "a new member took its name")] += 1
                self.folded[id(member)] = (member, _adopt_member(old, member))
        taken = {id(kept) for _, kept in self.folded.values()}
        for kept, member in combinations:
            if id(kept) not in taken:
                self._fold_member(kept, member)
        for name, member in old._member_map_.items():
            if name not in new._member_map_ and id(member) not in taken:
                self.stuck["%s.%s" % (old.__qualname__, name),
                           "whoever holds it has what is no member any more"] += 1
        # The old class gets these two maps.
        for members in new._member_map_, new._value2member_map_:
            members.update({key: self.current(member) for key, member in members.items()})
        # For other threads, until _member_names_ is the new one, and then the map:
        self.put(_attribute(old, "_member_map_"), dict(old._member_map_, **new._member_map_))

    def _fold_member(self, kept, member):
        """Give a member of an enum the name, value and attributes of a new one."""
        # 3.11: what `~` found last.
        self.put(_entry(vars(kept), "_inverted_"), _MISSING)
        for key, value in vars(member).items():
            self.put(_entry(vars(kept), key), type(kept) if key == "__objclass__" else value)
        self.stands_for(kept, member)

    def fold_named_tuple(self, old, new):
        """Name the live tuples of old fields: each has as many items as its class had then."""
        if old._fields != new._fields:
            count = len(_instances(old))
            if count:
                self.stuck[old.__qualname__, "existing tuples keep their old fields"] += count

    def fold_fields(self, old, new, fields):
        """Note what fields a class has gained; `fields` returns {name: what makes a value}."""
        self.refielded[id(old)] = old
        olds = fields(old)
        self.fills += [(old, name, make, "existing instances lack the new field %r, which has no "
                        "default" % name) for name, make in fields(new).items() if name not in olds]

    def fold_pydantic(self, old, new):
        """Have a model's validators built anew for the old class; they hold the new one."""
        self.fold_fields(old, new, _pydantic_fields)
        self.unbuilt.append(old)
        self.afterwards.append(self._rebuild_models)

    def _rebuild_models(self):
        """Build the validators of pydantic's models anew, so that they make the old class again.
        """
        while self.unbuilt:
            cls = self.unbuilt.pop()
            for name in ("core_schema", "validator", "serializer", "complete"):
                self.journal.keep(_attribute(cls, "__pydantic_%s__" % name))
            cls.model_rebuild(force=True)

    def fold_wrapper(self, old, new):
        """Fold the functions in a staticmethod, classmethod or property, and keep the old object.

        Where one of them can't be folded, return a new object: an old one can't be changed.
        """
        names = ("__func__",) if hasattr(new, "__func__") else ("fget", "fset", "fdel")
        before = [getattr(old, name) for name in names]
        parts = [self.fold(part, getattr(new, name)) for name, part in zip(names, before)]
        if any(part is not kept for part, kept in zip(parts, before)):
            return type(new)(*parts)
        if type(new) is property:
            self.put(_attribute(old, "__doc__"), new.__doc__)
        self.stands_for(old, new)
        return old

    def fold_lru_cache(self, old, new):
        """Fold the function in a cache object, which wraps it for good; it forgets its results."""
        self.afterwards.append(old.cache_clear)
        if type(new) is types.FunctionType:
            # It is cached no more.
            return self.fold(old.__wrapped__, new)
        if self.fold(old.__wrapped__, new.__wrapped__) is not old.__wrapped__:
            return new
        if old.cache_info().maxsize != new.cache_info().maxsize:
            self.stuck[old.__qualname__,
                       "whoever holds the lru_cache object keeps its maxsize"] += 1
            return new
        self.put(_attribute(old, "__dict__"), {
            key: self.current(value) for key, value in vars(new).items()})
        self.stands_for(old, new)
        return old

    def fold_instance(self, old, new):
        """Give the instance that a decorator made, as a class does, the attributes of a new one."""
        self.stands_for(old, new)
        for name in set(vars(old)) | set(vars(new)):
            before, value = vars(old).get(name, _MISSING), vars(new).get(name, _MISSING)
            if not _is_filled_later(before, value):
                self.put(_entry(vars(old), name), self.fold(before, value))
        return old

    # Live objects: what no name leads to. All this comes last and once for all modules, as it goes
    # through the heap, which is dear: references to what another object stands for now, instances
    # of classes that are others now, attributes that a new __init__ would have set.

    def _finish(self):
        """Reach closures, references, instances; take names away; tell the hooks."""
        self._follow_fields()
        for edit in self.edits:
            for name in edit.names_gone():
                self.put(_entry(edit.space, name), None if name == "__doc__" else _MISSING)
                if type(edit.space.get("__annotations__")) is dict:
                    self.put(_entry(edit.space["__annotations__"], name), _MISSING)
        for edit in self.ordered:
            if edit.names_gone():
                self.readers.follow(edit)
        for _, path, reason in self.closures.values():
            self.stuck[path, reason] += 1
        self._reach_what_lives()
        # Frameworks remember what they found in registries, which is other by now.
        for name, forget in _CACHES.items():
            if name in sys.modules:
                forget()
        self._call_hooks()
        self.readers.note_code()
        for edit in self.ordered:
            self._report_names(edit)
            self.readers.report_not_run_again(edit)
        self.readers.report_elsewhere()
        self._report_sleepers()
        self._report_stuck()

    def _move_classes(self):
        """Move instances and subclasses from classes that can't change in place, or are new."""
        for old, new, reason in self.moves:
            is_class = isinstance(old, type)
            count = self._move_instances({old: new}) if is_class else 0
            if count or reason != _ANOTHER_CLASS:
                self.stuck[getattr(old, "__qualname__", "?"), reason] += count
            for sub in old.__subclasses__() if is_class else ():
                try:
                    self.put(_attribute(sub, "__bases__"), tuple(
                        new if base is old else base for base in sub.__bases__))
                except TypeError as exc:
                    self.stuck[sub.__qualname__, "its base class is the old one (%s)" % exc] += 1
        if not self.is_patch:
            self._move_instances({new: old for new, old in self.folded.values()
                                  if isinstance(new, type)})

    def _move_instances(self, moves):
        """Change the classes of live objects; return how many refuse."""
        count = 0
        for instance in _instances(*moves):
            try:
                self.put(_attribute(instance, "__class__"), moves[type(instance)])
            except TypeError:
                count += 1
        return count

    def _reach_what_lives(self):
        """Move and complete instances; replace what was discarded; do what was put off."""
        self._move_classes()
        self._fill_instances()
        self._redirect()
        for function in self.afterwards:
            function()
        self._tell_of_classes()

    def _fill_instances(self):
        """Give live instances what new ones have, where its value is clear; else name it."""
        instances_of = functools.lru_cache(maxsize=None)(_instances_of)
        for cls, name, make, reason in self.fills:
            for instance in instances_of(cls):
                fields = _get_dict(instance)
                if fields is None or name in fields or hasattr(type(instance), name):
                    continue
                value = make() if callable(make) else _MISSING
                if value is _MISSING:
                    self.stuck[cls.__qualname__, reason] += 1
                else:
                    self.put(_entry(fields, name), value)

    def _call_hooks(self):
        """Call __reload__ of changed classes for each instance, of modules, and of on_reload."""
        hooked = {}
        for cls in [each for changed in self.classes.values() for each in _all_classes(changed[0])]:
            functions = [f for base, some in list(HOT.hooks.items()) if base() in cls.__mro__
                         for f in some]
            if hasattr(cls, "__reload__"):
                functions.append(type.__getattribute__(cls, "__reload__"))
            if functions:
                hooked[id(cls)] = cls, functions
        for instance in _instances(*[cls for cls, _ in hooked.values()]):
            self.keep_reached([instance])
            for function in hooked[id(type(instance))][1]:
                function(instance)
        for edit in self.edits:
            hook = edit.space.get("__reload__")
            if callable(hook) and any(pair.change != "same" for pair in edit.pairs):
                self.keep_reached([hook])
                hook(types.SimpleNamespace(**{
                    name: value for name, value in edit.before.items() if type(name) is str}))

    def _redirect(self):
        """Replace what was discarded, wherever a list, dict, set, cell or instance holds it.

        So a registry that was filled anew holds the old object, once. A tuple is replaced by
        another one where a list, set or dict holds it.
        """
        from weakref import KeyedRef
        moves = {id(pair[0]): pair for pair in _held_elsewhere(
            [pair for pair in self.folded.values() if pair[0] is not pair[1]])}
        if self.is_patch:
            moves = {key: pair for key, pair in moves.items()
                     if hasattr(type(pair[0]), "_member_map_")}
        # Of classes and functions that became another kind of thing, the old ones are replaced.
        moves.update((id(old), (old, new)) for old, new, _ in self.moves)
        # Else a WeakValueDictionary would lose them.
        for new, old in list(moves.values()):
            moves.update((id(ref), (ref, KeyedRef(old, ref.__callback__, ref.key)))
                         for ref in weakref.getweakrefs(new) if type(ref) is KeyedRef)
        sources = [source for source, _ in moves.values()]
        own = {id(source.__mro__) for source in sources if isinstance(source, type)}
        tuples = {}
        for holder in self._holders(sources):
            if type(holder) is not tuple:
                _redirect_holder(self.journal, holder, moves)
            elif id(holder) not in own:
                tuples[id(holder)] = holder, tuple(
                    moves.get(id(item), (0, item))[1] for item in holder)
        for holder in self._holders([each for each, _ in tuples.values()]):
            if type(holder) in _SEQUENCES + (set, dict):
                _redirect_holder(self.journal, holder, tuples)

    def _holders(self, sources):
        """Return what refers to one of `sources`, except for our own tables."""
        ours = {id(table) for table in [sources, self.known, self.folded, self.moves, vars(self)]}
        ours.update(id(edit.before) for edit in self.edits)
        ours.update(id(before) for _, before in self.journal._kept.values())
        return [holder for k in range(0, len(sources), 50)
                for holder in gc.get_referrers(*sources[k:k + 50]) if id(holder) not in ours]

    # What is put back when it fails. What we write is in the journal. What code of the program may
    # write is found before it runs: from the names in its statement on, through functions, by what
    # they read, and through containers, instances and classes. Locks, queues and event loops are
    # left alone: threads wait for them. What can't be seen so is in `called`, and in the error.

    def snapshot(self, edit, *statements):
        """Note what statements can reach now, to put it back; return what was found.

        Not more, because what other threads write meanwhile must not be put back.
        """
        values = []
        for statement in statements:
            if statement is not None:
                values += self.keep_names(statement, edit.space)
        if edit.space.get("__annotations__"):
            values.append(edit.space["__annotations__"])
        return self.keep_reached(values)

    def keep_reached(self, values):
        """Have an undo put back what some values lead to, and return all that was found."""
        found = list(_reachable(values))
        for each in found:
            if type(each) is types.FunctionType:
                self._keep_stored(each.__code__, each.__globals__)
            elif _container_kind(each):
                self.journal.keep_content(each)
            for member in _members(type(each)):
                self.journal.keep(_attribute(each, member.__name__))
        return found

    def keep_names(self, statement, space):
        """Note the names that a statement may bind; return the values that it reads."""
        names = statement.names
        for name in names.binds - {"*"}:
            self.journal.keep(_entry(space, name))
        code = statement.code
        self._keep_stored(code, space)
        if "*" in names.binds or not _INDIRECT.isdisjoint(code.co_names):
            self.journal.keep_content(space)
            for module in _modules_named(space, code.co_names):
                if not _is_library_module(module.__name__):
                    self.journal.keep_content(vars(module))
        read = names.reads.intersection(space)
        values = [space[name] for name in read]
        for module in _modules_named(space, read):
            values += _values_of(vars(module), code.co_names)
        return values

    def _keep_stored(self, code, space):
        """Note the globals that code sets, and the attributes that it may set on modules."""
        for name in _stored_names(code, "GLOBAL"):
            self.journal.keep(_entry(space, name))
        stored = _stored_names(code, "ATTR")
        for module in _modules_named(space, code.co_names) if stored else ():
            for name in stored:
                self.journal.keep(_entry(vars(module), name))

    # Tell. A name of a statement that ran counts as changed where it was there before, else
    # as added; what goes on as it was is counted in `stuck`, by name and reason.

    def _report_names(self, edit):
        """Add to the report what the statements of one module did to its names."""
        for pair in edit.pairs:
            new = pair.new
            if new is None or pair.change in ("same", "moved") and not self.everything or (
                    self._is_kept_out(edit, new)):
                continue
            was = edit.old.names if edit.old and pair.change != "lost" else ()
            known = {name for name in new.binds if name in was or name in (
                edit.before or edit.space)}
            names = sorted(new.binds - {"*"} - new.names.deletes)
            if new.acts_without_a_name or "*" in new.binds or new.kind == "Delete":
                self.report.add("changed", edit.name, [new.title])
            self.report.add("changed", edit.name, [name for name in names if name in known])
            self.report.add("added", edit.name, [name for name in names if name not in known])
        self.report.add("cant_tell", edit.name, edit.told)
        gone, statements = edit.names_gone(), self._removed_statements(edit)
        self.report.add("removed", edit.name, gone + [each.title for each in statements] + [
            "%s (of line %d)" % (pair.old.node.name, pair.old.start + 1) for pair in edit.pairs
            if pair.change == "gone" and pair.old.binds <= edit.new.names
            and getattr(pair.old.node, "decorator_list", ()) and not _is_overload(pair.old.node)])
        self._report_removed(edit, gone, statements)

    def _removed_statements(self, edit):
        """Return the statements that are gone and whose work may show in no name of their own."""
        return [pair.old for pair in edit.pairs if pair.change == "gone" and (
            pair.old.acts_without_a_name or bool(pair.old.binds) and not pair.old.binds_surely
            and pair.old.binds <= edit.new.names and not pair.old.is_main_guard
            and not pair.old.names.deletes)]

    def _report_removed(self, edit, gone, statements):
        """Name the statements that are gone, but for those that changed what is new or gone too."""
        bound = _bound_by(pair.new for pair in edit.pairs if pair.change in _VALUES).union(gone)
        for each in statements:
            if not each.changes or not each.changes <= bound:
                self.stuck[each.title, "the statement was taken away; what it did stays"] += 0
        for pair in edit.pairs:
            if pair.change == "value" and pair.old.acts_without_a_name and not (
                    pair.old.changes & bound or self._is_kept_out(edit, pair.new)
                    or _key(getattr(pair.old.node, "targets", pair.old.title)) == _key(
                        getattr(pair.new.node, "targets", pair.new.title))):
                self.stuck[pair.old.title, (
                    "the statement is another now; what it did before may still be there")] += 0
        unseen = sorted(set(edit.before) - edit.new.names - _IMPORT_NAMES)
        for pair in edit.pairs if unseen else ():
            if pair.change == "value" and not pair.new.is_harmless and (
                    not _INDIRECT.isdisjoint(pair.new.code.co_names)):
                self.report.notes.append("%s: a name that it bound before, and does not any more, "
                                         "is still there: which of %s, can't be told" % (
                                             pair.new.title, ", ".join(unseen)))

    def _report_stuck(self):
        """Add to the report what goes on as it was, each reason with its count."""
        self.report.stale += [Stale(name, reason, count)
                              for (name, reason), count in sorted(self.stuck.items())]

    def _report_sleepers(self):
        """Count the running frames and suspended generators that finish on old code."""
        codes = [code for _, code in self.old_codes.values()]
        for edit in self.edits:
            if any(pair.change == "gone" for pair in edit.pairs):
                codes += [code for _, code in _code_paths(_nested_codes(edit.old.code))]
        running = _running_frames()
        for frames, reason in (
                (running, "a running frame finishes on the old code"),
                (_suspended_frames(codes, running),
                 "a suspended generator or coroutine finishes on the old code")):
            # By code: the frames of a deep recursion have one.
            alike = collections.defaultdict(list)
            for frame in frames:
                alike[id(frame.f_code), id(frame.f_globals)].append(frame)
            for first, *more in alike.values():
                if self._is_old(first):
                    self.stuck[self._old_path(first.f_code), reason] += 1 + len(more)

    def _old_path(self, code):
        """Return the path of a code that is no live function's any more; up to 3.10 its name."""
        path = getattr(code, "co_qualname", code.co_name)
        return self.old_codes.get(id(code), (path, code))[0]

    def _is_old(self, frame):
        """Tell whether a frame runs what was replaced, now or earlier, or what the file has not."""
        code = frame.f_code
        return not code.co_name.endswith("comp>") and any(
            frame.f_globals is edit.space and _is_in_file(code, edit.new)
            and _behaviour(code) not in edit.new.behaviours
            for edit in self.edits)


def _with_lost(edit):
    """Return the pairs, with "lost" for definitions that somebody took away, as by `del m.f`."""
    if any(pair.change == "lost" for pair in edit.pairs):
        # unpatch() has marked the one that it wants back.
        return edit.pairs

    def is_lost(pair):
        return pair.old is not None and pair.change in _LEFT_ALONE and pair.new.is_definition and (
            pair.new.node.name not in edit.space
            and len([each for each in edit.new.statements
                     if pair.new.node.name in each.binds]) == 1
            and not edit.is_not_reached(pair.new) and not any(      # the module took it away itself
                pair.new.node.name in _stored_names(code, "GLOBAL")
                for _, code in _code_paths([edit.new.code])))
    return [pair._replace(change="lost") if is_lost(pair) else pair for pair in edit.pairs]


def _ids_of(values):
    """Return the ids of what definitions made: the values of their names, and what these wrap."""
    return _ids(itertools.chain(*([each, *_functions_in(each)] for each in values)))


def _ids(values):
    """Return the ids of values, without constants, which others that mean something else hold."""
    return {id(each) for each in values if type(each) not in _PLAIN_TYPES + (tuple,)}


_ANOTHER_CLASS = "another class has its name now"
_VALUES = ("value", "again", "new")
_INITS = ("__init__", "__post_init__", "__attrs_post_init__")


class _Scope:
    """A module or a class, in which statements bind names."""

    def __init__(self, edit, cls=None, path="", pair=None):
        # The class, None: the module; its path as in __qualname__.
        self.edit, self.cls, self.path = edit, cls, path
        self.prefix = path + "." if path else ""
        self.statements = edit.new.statements if pair is None else pair.new.body
        self.held = edit.held if cls is None else {}    # see _Edit
        self._lasts = None      # name -> statement, once last_binder() was asked

    def name_of(self, name):
        """Return a name as the scope has it: a class mangles private ones."""
        return name if self.cls is None else _mangled(name, self.cls.__name__)

    def title(self, name):
        """Return the full name of something in the scope, for the report."""
        return ("%s.%s%s" % (self.edit.name, self.prefix, name)).rstrip(".")

    def get(self, name):
        """Return what a name of the source is bound to in the scope, or _MISSING."""
        if self.cls is None:
            return self.edit.space.get(name, _MISSING)
        return vars(self.cls).get(self.name_of(name), _MISSING)

    def of_class(self, pair):
        """Return the scope of the live class that a statement made, or None."""
        path = self.prefix + getattr(pair.new.node, "name", "")
        cls = self.get(pair.new.node.name) if pair.new.kind == "ClassDef" else None
        is_paired = pair.old is not None or id(pair.new) in self.edit.subs
        if is_paired and _is(cls, type) and cls.__qualname__ == path and (
                _is_of(cls, self.edit.name)):
            return _Scope(self.edit, cls, path, pair)
        return None

    def put(self, apply, name, value):
        """Bind a name of the source, so that an undo takes it back."""
        if self.cls is None:
            apply.put(_entry(self.edit.space, name), value)
        else:
            _put_on_class(apply, self.cls, self.name_of(name), value)

    def count(self, name):
        """Return how many statements bind `name`."""
        return len([each for each in self.statements if name in each.binds])

    def last_binder(self, name):
        """Return the statement that has the last word on a name, or None."""
        if self._lasts is None:
            # Of a main guard only the script itself has come to the inside.
            self._lasts = _last_binders(each for each in self.statements if not (
                each.is_main_guard and self.edit.name != "__main__"))
        return self._lasts.get(name)

    def execute(self, nodes, apply, statement=None):
        """Run statements; return what they bound that is not bound yet."""
        edit, held = self.edit, self.held
        if self.cls is not None:
            return self.in_class(nodes)
        code = edit.new.compile(nodes)
        if statement.binds_at_its_end:
            space = dict(edit.lost_values(statement), **held)
            exec(code, edit.space, space)
        else:
            space = edit.space
            # Others may look at the module while it runs.
            space.update(held)
            held.clear()
            apply.keep_names(statement, space)
            space.pop("__conditional_annotations__", None)
            if statement.kind == "Delete":
                # `del` may name what is gone already.
                space.update(dict.fromkeys(statement.names.deletes.difference(space)))
            exec(code, space)
            edit.annotated[id(statement)] = space.get("__conditional_annotations__", ())
        return {name: space[name] for name in statement.binds if name in space}

    def in_class(self, nodes):
        """Run statements in the class's scope; `super()` in what they define means the class."""
        import ast
        parts = self.path.split(".")
        params = _type_params(self.edit.space, parts)
        for part in reversed(parts):
            wrapper = ast.parse("class X: pass").body[0]
            wrapper.name, wrapper.body = part, nodes
            nodes = [ast.copy_location(wrapper, nodes[0])]
            if params:
                wrapper.type_params = [ast.copy_location(ast.TypeVar(name), nodes[0])
                                       for name in params]
        code = self.edit.new.compile_alone(nodes)
        for part in parts:
            code = _class_code(code, part)
        code = self.edit.new.with_own_codes(code)
        return _run_body(code, self.edit.space, self.cls, params)

    def evaluate(self, node, kept):
        """Return the function of a `def`, without decorators; `kept` defaults are not evaluated."""
        import ast
        import copy
        bare, nodes = copy.copy(node), _default_nodes(node)
        bare.decorator_list, bare.args = [], copy.copy(node.args)
        nothing = {id(nodes[name]): ast.copy_location(ast.parse("None").body[0].value, nodes[name])
                   for name in kept}
        for field in ("defaults", "kw_defaults"):
            setattr(bare.args, field, [nothing.get(id(each), each)
                                       for each in getattr(node.args, field)])
        if self.cls is None:
            space = {}
            exec(self.edit.new.compile([bare]), self.edit.space, space)
        else:
            space = self.in_class([bare])
        function, code = space[self.name_of(node.name)], self.edit.new.code_of(node)
        if code.co_freevars == function.__code__.co_freevars:
            function.__code__ = code
        return function

    def decorate(self, node, function):
        """Return what the decorators of a node make of a function."""
        import ast
        space = {} if self.cls is None else _ClassSpace(self.cls)
        decorators = ast.copy_location(ast.Tuple(node.decorator_list, ast.Load()), node)
        code = compile(ast.Expression(body=decorators), self.edit.path, "eval",
                       self.edit.new.flags, True)
        for decorator in reversed(eval(code, self.edit.space, space)):
            function = decorator(function)
        return function

    def annotate(self, apply):
        """Give the class the annotations that its statements have now."""
        import copy
        nodes = [copy.copy(each.node) for each in self.statements if each.kind == "AnnAssign"]
        for each in nodes:
            each.value = None
        found = self.in_class(nodes) if nodes else {}
        for name in ("__annotations__", "__annotate_func__", "__annotations_cache__"):
            apply.put(_attribute(self.cls, name), found.get(name, _MISSING))


_MADE_BY_CLASS = {"__module__", "__qualname__", "__firstlineno__", "__static_attributes__",
                  "__conditional_annotations__", "__classcell__", "__classdictcell__",
                  "__type_params__"}


class _ClassSpace(dict):
    """The namespace for statements of a class body: they find what the class has."""

    def __init__(self, cls):
        super().__init__()
        self._cls = cls

    def __missing__(self, name):
        if name in ("__annotations__", "__name__", "__annotate_func__", "__module__"):
            raise KeyError(name)
        # What decorators ask for comes unmangled.
        return vars(self._cls)[_mangled(name, self._cls.__name__)]


def _put_on_class(apply, cls, name, value):
    """Set an attribute as a program does, so that a metaclass sees it; an enum's refuses that."""
    before = vars(cls).get(name, _MISSING)
    if before is value:
        return
    setter = type(cls).__setattr__
    if value is _MISSING or hasattr(cls, "_member_map_") or setter is type.__setattr__:
        apply.put(_attribute(cls, name), value)
        if hasattr(type(value), "__set_name__"):
            type(value).__set_name__(value, cls, name)
        return
    read, write, key = _attribute(cls, name)

    def take_back():
        if before is _MISSING and _is_mapped(cls, name):
            raise RuntimeError("SQLAlchemy has mapped %s.%s to its table; it stays" % (
                cls.__qualname__, name))
        write(before)
    apply.journal.on_undo(take_back, key)
    setattr(cls, name, value)


def _is_mapped(cls, name):
    """Tell whether SQLAlchemy has made a column or relation of an attribute, for good."""
    mapper = vars(cls).get("__mapper__") if cls is not None else None
    return mapper is not None and mapper.has_property(name)


def _give_column_its_type(scope, node, value):
    """SQLAlchemy reads a column's annotation where it scans a class: let it scan another."""
    orm = sys.modules.get("sqlalchemy.orm")
    if orm is None or type(value) is not orm.MappedColumn or type(node).__name__ != "AnnAssign" or (
            "__mapper__" not in vars(scope.cls)):
        return
    name, types_of = scope.edit.name, scope.cls.registry.type_annotation_map
    base = type("Base", (orm.DeclarativeBase,), {
        "type_annotation_map": types_of, "__module__": name})
    key = orm.mapped_column(sys.modules["sqlalchemy"].Integer, primary_key=True)
    made = type(base)("Scan", (base,), dict(
        scope.in_class([node]), __module__=name, __tablename__="scan", hotrepl_key=key))
    column = made.__table__.c[node.target.id]
    value.column.type, value.column.nullable = column.type, column.nullable


# What becomes of a live function: its new code and both nodes, or why there is none.
_Next = record("_Next", "code path reason is_changed is_inner old new")


class _Successors:
    """Which code of the new text belongs to a live function of the old one.

    A function is found by the line of its code: that leads to a statement of the old text, of a
    module or of a class that changed, and in that to a node, which has a partner in the new text.
    """

    def __init__(self, edit):
        self.edit = edit
        self._leaves = []       # (first line of the old statement, pair, path of its class)
        self._maps = {}         # id of a pair -> {(name, old line): what _pair_functions() says}
        if edit.old is not None:
            self._add(edit.pairs, "")
            self._leaves.sort(key=lambda leaf: leaf[0])
        self._starts = [leaf[0] for leaf in self._leaves]

    def _add(self, pairs, path):
        """Note the statements that live functions come from; those of a changed class singly."""
        for pair in pairs:
            if pair.old is not None:
                self._leaves.append((pair.old.start + 1, pair, path))
                if pair.change == "class":
                    self._add(self.edit.sub_pairs(pair), path + pair.new.node.name + ".")

    def named_functions(self):
        """Return the functions that changed if their names lead to all of them, else None.

        So it is where nothing runs and nothing but plain functions of the module changed.
        """
        found = []
        for line, pair, path in self._leaves:
            if pair.change != "same":
                value = self.edit.space.get(getattr(pair.old.node, "name", ""))
                if path or pair.change not in _LEFT_ALONE or not (
                        pair.old.is_function and not pair.old.node.decorator_list
                        and type(value) is types.FunctionType and not _nested_codes(value.__code__)
                        and value.__code__.co_firstlineno == line
                        and value.__globals__ is self.edit.space):
                    return None
                found.append(value)
        return found

    def of(self, function):
        """Return a _Next for a function, or None where nothing is to be done."""
        code = function.__code__
        if not _is_in_file(code, self.edit.new):
            return None
        if self.edit.old is None:
            return self._by_path(function, code)
        import bisect
        line = code.co_firstlineno
        i = bisect.bisect(self._starts, line) - 1
        if i < 0:
            return None
        _, pair, path = self._leaves[i]
        if pair.change == "same":
            return None
        # Only its place is another: then the lines of all its functions are, by as many.
        if pair.new is not None and pair.old.text_key == pair.new.text_key:
            new = _best_match(code, self.edit.new.codes_at(
                code.co_name, line + pair.new.start - pair.old.start))
            return new and _Next(new, function.__qualname__, "", False, False, None, None)
        return self._mapped(pair, path, code)

    def _mapped(self, pair, path, code):
        """Return the _Next of a function in a statement that changed, by its name and line."""
        key = code.co_name, code.co_firstlineno
        if id(pair) not in self._maps:
            found = self._maps[id(pair)] = collections.defaultdict(list)
            new_node = pair.new.node if pair.new is not None else None
            for each in _pair_functions(pair.old.node, new_node, path):
                found[_name_of(each[1]), _first_line(each[1])].append(each)
        found, at = self._maps[id(pair)].get(key, []), 0
        if len(found) > 1:
            # Several lambdas on one line: which one is it?
            olds = self.edit.old.codes_at(*key)
            alike = code if code in olds else _best_match(code, olds)
            at = olds.index(alike) if alike in olds[:len(found)] else 0
        if not found:
            return None
        where, old, new, reason = found[at]
        is_inner = "<lambda>" in where or "<locals>" in where
        if new is None:
            return _Next(None, where, reason, True, True, old, new) if is_inner else None
        if not is_inner and _shell(old) != _shell(new):
            # Its head changed: it is defined anew when its turn comes.
            return None
        code = self.edit.new.code_of(new, pair.new.node)
        return _Next(code, where, _NO_SUCH, _key(old) != _key(new), is_inner, old, new)

    def _by_path(self, function, code):
        """The old text is unknown: the code of the new text with the same path, if it is clear."""
        path = _path_of(function)
        found = self.edit.new.codes.get(path, [])
        alike = [each for each in found if _behaviour(each) == _behaviour(code)]
        if alike:
            return _Next(alike[0], path, "", False, False, None, None)
        if "<locals>" not in path and "<lambda>" not in path:
            return None
        if len(found) == 1:
            return _Next(found[0], path, "", True, False, None, None)
        return _Next(None, path, _UNCLEAR if found else _NO_SUCH, True, True, None, None)


def _path_of(function):
    """Return the path of a function as its code has it: wrappers take another's __qualname__."""
    return getattr(function.__code__, "co_qualname", None) or (
        function.__qualname__ if function.__qualname__.endswith(function.__code__.co_name)
        else function.__code__.co_name)


def _is_foreign(value):
    """Tell whether what a statement calls is no code of the program: nobody sees what it does."""
    name = getattr(value, "__name__", "") if _is(value, types.ModuleType) else (
        getattr(value, "__module__", None) if _is(value, (
            type, types.FunctionType, types.BuiltinFunctionType)) else "")
    return name and name != "builtins" and _is_library_module(name)


def _at_path(space, parts):
    """Return what stands at a path of classes in a namespace, or _MISSING."""
    value = _MISSING
    for part in parts:
        value = space.get(part, _MISSING)
        space = vars(value) if _is(value, type) else {}
    return value


def _decorator_name(node):
    """Return the last name of a decorator: `route` of `@app.route("/")`."""
    while type(node).__name__ == "Call":
        node = node.func
    return getattr(node, "attr", getattr(node, "id", ""))


def _is_overload(node):
    """Tell whether it is one of typing's overloads: they say what a later `def` does."""
    return any(_decorator_name(each) == "overload" for each in getattr(node, "decorator_list", ()))


_TRANSPARENT = {"staticmethod", "classmethod", "property", "setter", "getter", "deleter", "wraps",
                "lru_cache", "cache", "cached_property", "contextmanager", "asynccontextmanager",
                "abstractmethod", "override", "final", "overload", "total_ordering",
                "singledispatch", "dataclass"}


def _is_transparent(node):
    """Tell whether all decorators only wrap, and look at no signature."""
    return all(_decorator_name(each) in _TRANSPARENT for each in node.decorator_list)


def _lost_decorators(pair):
    """Return the names of old decorators that a definition has no more, if they may register it."""
    olds, news = [{_decorator_name(each) for each in getattr(statement.node, "decorator_list", ())}
                  for statement in (pair.old or pair.new, pair.new)]
    return olds - news - _TRANSPARENT


def _class_head(statement):
    """Return the key of all of a class statement but its body."""
    node = statement.node
    return _key([node.decorator_list, node.bases, node.keywords,
                 getattr(node, "type_params", [])], False)


def _needs_its_statement(cls, pairs):
    """Tell whether a class statement must run as a whole for what changed in it."""
    active = [pair.new or pair.old for pair in pairs if pair.change not in _LEFT_ALONE]
    values = [each for each in active
              if not each.is_definition and not each.is_constant and each.kind != "Pass"]
    is_decorated = any(each.is_function and not _is_transparent(each.node) for each in active)
    # Which of these a class has come to, only its statement tells.
    if any("AnnAssign" in str(each.dump) for each in values) and any(
            pair.new and not pair.new.is_definition and pair.new.kind != "AnnAssign"
            and "AnnAssign" in str(pair.new.dump) for pair in pairs):
        return True
    kind = next((each for each in _CLASS_KINDS if each.fits(cls)), None)
    return any("__slots__" in each.binds for each in values) or kind is not None and (
        bool(values) or is_decorated and kind.sees_functions)


def _unedited(name, known):
    """Return an edit of a module whose text is the one that runs."""
    edit = _Edit(name, known.module(), known.path, known.stamp, known.text)
    edit.compare()
    return edit


# --- Readers: what was made of a value that is another now, and who imported it ---
# RATE = 3 ran anew. `PRICE = RATE * 10` has no call in it, so it is evaluated with the names as
# they were and as they are: PRICE follows where it still is what the old names make of it. Where
# the program has set it meanwhile, or nobody knows what `PRICE = rounded(RATE)` would do besides,
# the statement is named as "not run again". So it goes on through defaults, class attributes and
# the modules that imported one of the names, until nothing follows any more.

class _Readers:
    """The statements, of all modules, that read what a transaction changes."""

    def __init__(self, apply):
        self._apply = weakref.proxy(apply)      # which has us
        self._sources = {}              # name -> _Source of a module that is not edited
        self._values = collections.defaultdict(set)     # module -> names of values that changed
        # id -> function or class: code changed that may have run at import, or to derive a class
        self._codes, self._bases = {}, {}
        self._modules = set()           # ids of the edited modules, and of the packages above them
        self._ids = set()               # of all three
        self._spaces = set()            # ids of namespaces of edited modules: values changed

    def follow(self, edit):
        """Evaluate anew what is pure and was made of changed values; follow imports of them."""
        todo, rounds = [(edit, edit.new, edit.before)], collections.Counter()
        while todo:
            follower, source, before = todo.pop()
            rounds[follower.name] += 1
            if rounds[follower.name] > 500:
                # Two modules with `N = N + 1` that import N from each other would never end.
                continue
            olds, news = dict(before), dict(follower.space)
            # A name that was bound, and is deleted again further down.
            for pair in follower.pairs:
                if pair.change == "value" and pair.new.is_pure and pair.old.is_pure:
                    for name in pair.new.binds - set(follower.space):
                        olds[name] = _pure_value(pair.old.node.value, before)
                        news[name] = _pure_value(pair.new.node.value, follower.space)
            names = {name for name in olds.keys() & news.keys() if not (
                _is_definition(news[name]) or _is(news[name], types.ModuleType)
                or _is_plain_equal(olds[name], news[name]))}
            if names:
                self.follow_pure(follower, source.statements, None, olds, news, names)
                self._values[follower.name] |= names
            changed = {name for name in (set(before) | set(follower.space)) - _IMPORT_NAMES
                       if before.get(name, _MISSING) is not follower.space.get(name, _MISSING)}
            if changed:
                todo += self._follow_imports(follower, before, changed)

    def follow_pure(self, edit, statements, cls, olds, news, names):
        """Evaluate anew, in file order, what unchanged pure expressions have made of some names.

        So it is done with values, attributes of classes and defaults of functions. `olds` and
        `news` are the namespaces before and now; what follows is added to them, and to `names`.
        """
        lasts, path = _last_binders(statements), cls.__qualname__ + "." if cls else ""
        for each in statements:
            used = each.mentions(names) and each.names.reads & names
            if not used or edit.runs(each):
                continue
            live = edit.space if cls is None else vars(cls)
            value = live.get(getattr(each.node, "name", None))
            if each.is_function:
                self._follow_defaults(edit, value, each, olds, news)
            elif each.kind == "ClassDef" and _is(value, type) and (
                    value.__module__, value.__qualname__) == (edit.name, path + each.node.name):
                self.follow_pure(edit, each.body, value, dict(olds, **vars(value)),
                                 dict(news, **vars(value)), names - _bound_by(each.body))
            # Of special classes the metaclass has taken the values, and made something of them.
            elif each.is_pure and all(lasts[name] is each for name in each.binds) and (
                    cls is None or _is_plain_class(cls)):
                was, now = [_pure_value(each.node.value, space) for space in (olds, news)]
                for name in each.binds if now is not _MISSING else ():
                    own = _mangled(name, cls and cls.__name__)
                    if _is_plain_equal(live.get(own, _MISSING), was) and not (
                            _is_plain_equal(was, now)):
                        place = _attribute(cls, own) if cls else _entry(edit.space, own)
                        self._apply.put(place, now)
                        olds[name], news[name] = was, now
                        names.add(name)
                        self._apply.report.add("followed", edit.name, [path + name])
                    elif not _is_plain_equal(live.get(own, _MISSING), now):
                        self._report_not_run(edit, each, used, path)
            elif cls is not None:
                self._report_not_run(edit, each, used, path)

    def _follow_defaults(self, edit, value, statement, olds, news):
        """A default that is a pure expression of a changed value, and still what that made."""
        for parameter, node in _default_nodes(statement.node).items():
            if not _is_pure_expression(node):
                continue
            was, now = _pure_value(node, olds), _pure_value(node, news)
            for function in _functions_in(value):
                live = _live_defaults(function) if function.__globals__ is edit.space and (
                    function.__code__.co_name == statement.node.name) else {}
                if parameter in live and was is not _MISSING and now is not _MISSING and (
                        _is_plain_equal(live[parameter], was) and not _is_plain_equal(was, now)):
                    live[parameter] = now
                    self._apply._put_code(function, (function.__code__,) + _as_defaults(
                        function.__code__, live), is_changed=False)

    def _follow_imports(self, edit, before, changed):
        """Bind in modules that imported a name what it is now; return them, to go on there."""
        followers = []
        for name, names in sorted(self.importers.get(edit.name, {}).items()):
            if changed.isdisjoint(names) and "*" not in names:
                continue
            space, source = _space_of(sys.modules.get(name)), self.source_of(name)
            if source is None or space is edit.space or space is _NO_SPACE:
                # It is unknown, the changed module itself, or not loaded any more.
                continue
            values, was = _imported_values(source, space, edit, before), dict(space)
            for each, value in values.items():
                self._apply.put(_entry(space, each), value)
            if values:
                self._apply.report.add("followed", name, sorted(set(values) - {"__all__"}))
                self._values[name] |= set(values)
                followers.append((_Follower(name, space), source, was))
        return followers

    def source_of(self, name):
        """Return the _Source that a module runs at this moment, or None where it is unknown."""
        if name in self._apply.by_name and name in self._apply.started:
            return self._apply.by_name[name].new
        if name not in self._sources:
            self._sources[name] = _source_of(HOT.known.get(name))
        return self._sources[name]

    # {module: {name of one that imports something from it: what}}
    importers = _once(lambda each: _import_index(each._apply.edits))

    def report_readers(self, edit, names):
        """Name unchanged statements that read what changed; of functions, what runs at import."""
        for pair in edit.pairs:
            if pair.new is not None and pair.change in _LEFT_ALONE and (
                    pair.new.names.reads & names) and not pair.new.is_main_guard:
                self._report_not_run(edit, pair.new, pair.new.names.reads & names)

    def _report_not_run(self, edit, statement, names, path=""):
        """Name a statement that read something else when it ran, unless it has run again now."""
        if self._apply.everything and edit.name in self._apply.by_name:
            return
        title = statement.node.name if statement.is_definition else statement.title
        sets = {name for called in statement.names.calls
                for function in _callees(edit.space.get(called))
                for name in _stored_names(function.__code__, "GLOBAL")}
        self._apply.report.add("not_run_again", edit.name, ["%s%s (%s changed%s)" % (
            path, title, ", ".join(sorted(names)),
            "; it sets " + ", ".join(sorted(sets)) if sets else "")])

    def note_code(self):
        """Note whose code changed that an unchanged statement may have run at import."""
        for edit in self._apply.edits:
            for pair in edit.pairs:
                if pair.change in _VALUES and not pair.new.is_definition:
                    self._values[edit.name] |= {
                        name for name in pair.new.binds if name not in edit.space
                        or name in edit.before and not _is_plain_equal(
                            edit.before[name], edit.space[name])}
            for found, names in (
                    (self._codes, _own_code_changed(edit, _RUN_AT_ONCE).union(_bound_by(
                        pair.new for pair in edit.pairs if pair.change == "def"))),
                    (self._bases, _own_code_changed(edit, _RUN_BELOW))):
                found.update((id(value), value) for value in _values_of(edit.space, names))
        self._bases.update((key, value) for key, value in self._codes.items()
                           if _is(value, type) and issubclass(value, type))
        self._bases = {key: value for key, value in self._bases.items() if _is(value, type)}
        self._modules = {id(sys.modules.get(name)) for edit in self._apply.edits
                         for name in _with_parents(edit.name)}
        self._ids = self._modules.union(self._codes, self._bases)
        self._spaces = {id(each.space) for each in self._apply.edits if self._values[each.name]}

    def report_not_run_again(self, edit):
        """Name unchanged statements that used at import what is another now."""
        for pair in edit.pairs:
            if pair.new is not None and pair.change not in _LEFT_ALONE and (
                    self._apply._is_kept_out(edit, pair.new)) and (
                    edit.name == "__main__" or not pair.new.is_main_guard):
                self._apply.report.add("not_run_again", edit.name, [pair.new.title])
        self._report_users(edit, [pair.new for pair in edit.pairs if pair.change in _LEFT_ALONE],
                           self._names_in(edit))
        self._report_copied(edit)

    def report_elsewhere(self):
        """Name such statements also in modules that are not edited.

        Only those modules are parsed that have what changed, or a class derived from it.
        """
        below = {cls.__module__ for base in self._bases.values() for cls in _all_classes(base)}
        for module, known in list(HOT.known.items()):
            if module in self._apply.by_name:
                continue
            follower = _Follower(module, _space_of(known.module()))
            names = self._names_in(follower)
            if module in below or names and mentions_at_import(known.text or b"", names):
                source = self.source_of(module)
                self._report_users(follower, source.statements if source else (), names)

    def _names_in(self, module):
        """Return the names by which statements of a module may have used what is another now."""
        items, names = list(module.space.items()), set(self._values[module.name])
        names.update([name for name, value in items if id(value) in self._ids])
        if self._spaces:
            names.update(name for name, value in items for each in _callees(value)
                         if id(each.__globals__) in self._spaces)
        return names

    def _report_users(self, module, statements, names):
        """Name those of some statements that used what is another now, as far as they have run."""
        line = _top_line(module.space)
        for each in statements:
            may_use = each.kind == "ClassDef" or each.mentions(names)
            if may_use and not each.is_main_guard and (
                    each.kind not in ("Import", "ImportFrom")) and (
                    line is None or each.end < line):
                used = self._used_at_import(each, module.space, self._values[module.name])
                if used:
                    self._report_not_run(module, each, used)

    def _used_at_import(self, statement, space, values):
        """Return the names by which a statement used at import what is another now."""
        names, node = statement.names, statement.node
        used = {name for name in names.calls | names.heads if id(space.get(name)) in self._codes}
        if statement.kind == "ClassDef":
            cls = space.get(node.name)
            used -= _Names(node.bases).reads
            used |= {base.__name__ for base in (cls.__mro__[1:] + type(cls).__mro__ if _is(
                cls, type) else ()) if id(base) in self._bases}
        if names.reads & values:
            nodes = [node]
            if statement.is_definition:
                nodes = _evaluated_nodes(node, statement.source.has_lazy_annotations)
            elif statement.is_pure and _pure_value(node.value, space) is not _MISSING:
                nodes = []
            used |= _Names(nodes).reads & values - statement.binds
        for name in names.reads:
            value = space.get(name)
            if id(value) in self._modules:
                for each in _modules_named({name: value}, {name, *statement.code.co_names}):
                    used |= self._used_of_module(
                        statement, vars(each), name in names.calls | names.heads)
            elif name in names.calls:
                used |= self._read_when_called(value)
        return used

    def _used_of_module(self, statement, space, is_called):
        """As _used_at_import, for what a statement read as `module.name`."""
        found = _names_at_import(statement.code)
        used = {name for name in found if is_called and id(space.get(name)) in self._codes}
        used.difference_update(getattr(each, "attr", "") for each in getattr(
            statement.node, "bases", ()))
        return used | found & self._values[space["__name__"]]

    def _read_when_called(self, value):
        """Return the changed globals that a function, or the constructor of a class, reads."""
        found = set()
        for function in _callees(value):
            code, changed = function.__code__, self._values.get(
                function.__globals__.get("__name__"), set())
            # First the quick look: of most functions no instruction need be looked at.
            if not changed.isdisjoint(code.co_names):
                found |= changed.intersection(_stored_names(code, "GLOBAL", ("LOAD_",)))
        return found

    def _report_copied(self, edit):
        """Name calls that may have copied what a registry holds, such as aiohttp's add_routes()."""
        heads = {name for pair in edit.pairs for each in [pair.new or pair.old]
                 if pair.change not in _LEFT_ALONE and each.is_definition
                 for name in each.names.heads
                 if hasattr(type(edit.space.get(name)), "__iter__")}
        importers = self.importers.get(edit.name, ()) if heads else ()
        for name in [edit.name] + sorted(importers):
            follower = _Follower(name, _space_of(sys.modules.get(name)))
            source = self.source_of(name) if heads else None
            for each in source.statements if source else ():
                inner = {read for value in _values_of(follower.space, each.names.calls)
                         if is_python_function(value) for read in value.__code__.co_names}
                if not each.is_definition and each.names.calls and each.kind != "For" and any(
                        name in each.names.reads - each.names.calls | inner
                        or "." + name in each.title for name in heads):
                    self._report_not_run(follower, each, heads)


def _callees(value):
    """Return the function that a call of a value runs: itself, or the constructor of a class."""
    function = vars(value).get("__init__") if _is(value, type) else value
    return [function] if is_python_function(function) else []


# --- Registrations: the entries that a definition made in lists and dicts ---
# `@route` puts a function, or what it made of it, into a list or dict of somebody. When it is
# called again for b:
#     routes before             [a, b, c]       what leads to b is taken out
#     while the decorator runs  [a, c, b2]      what came is b2
#     afterwards                [a, b2, c]      it gets the place; where nothing came, b returns
# Where b and b2 are plain instances, b stays in the list and takes the content of b2: others may
# hold it. An entry is (key, value) of a dict, (id, item) of a list, deque or set.

class _Registrations:
    """What a definition that runs again had put into containers, and what it puts there now."""

    def __init__(self, apply, reached, targets):
        self._apply = weakref.proxy(apply)      # which has us
        self._targets = targets         # ids of what the definition had made
        ids = set(map(id, reached))     # of apps, or of their blueprints
        self._flasks = [_Flask(apply, app, targets) for app in apply.flask_apps
                        if not ids.isdisjoint(map(id, [app, *app.blueprints.values()]))]
        reached = reached + apply.keep_reached([each.app for each in self._flasks])
        spaces = {id(_get_dict(each)) for each in reached if not _container_kind(each)}
        places = {id(each): each for each in reached if _is(each, _REGISTRIES)
                  and id(each) not in spaces and not (      # nor the names of a module
                      _is(each, dict) and {"__name__", "__spec__"} <= dict.keys(each))}
        self._places = list(places.values())
        self._befores = {}              # id -> entries before all
        self._bases = {}                # id -> entries after the old ones were taken out
        self._grown = set()             # ids of those that got others then
        self.taken = []                 # the containers that had old ones ...
        self.returned = []              # ... and those where they came back

    def renew(self, make):
        """Take the old entries out, call `make`, put what it registered in their places."""
        self._befores = {id(each): _entries(each) for each in self._places}
        self._take_out()
        self._bases = {id(each): _entries(each) for each in self._places}
        for each in self._flasks:
            each.open()
        result = make()
        self._grown = {id(each) for each in self._places
                       if len(_entries(each)) > len(self._bases[id(each)])}
        # Only now is known whether something came for what was taken out.
        for each in self._flasks:
            each.close()
        for container in self.taken:
            self._put_in_place(container)
        return result

    def drop(self):
        """Take the old entries out for good; tell whether there were any."""
        self._take_out()
        for each in self._flasks:
            each.open()
            each.close()
        return bool(self.taken)

    def _take_out(self):
        """Take what leads to the old definition out of all containers."""
        for container in self._places if self._targets else ():
            entries = _entries(container)
            kept = [(key, value) for key, value in entries if id(key) not in self._targets
                    and not _leads_to(value, self._targets)]
            if len(kept) < len(entries):
                self.taken.append(container)
                _put_entries(container, kept)

    def _put_in_place(self, container):
        """Give new entries the places of the old ones; where nothing came, the old ones return."""
        before, now = self._befores[id(container)], _entries(container)
        news, rest = _gained(self._bases[id(container)], now, _KEY)
        # A decorator that inserts, as at the front, knows the place better.
        if not _is(container, set) and rest != now[:len(rest)]:
            # They stand where the decorator put them.
            return
        olds = {key for key, _ in _gained(rest, before, _KEY)[0]}
        # Some is put there only once, as by `if f not in R`: what nothing came for returns.
        returns = not news and not self._has_moved(container)
        if returns:
            self.returned.append(container)
        kept, result = dict(rest), []
        for key, value in before:
            partner = _take_partner(key, olds, news) if key in olds else None
            if partner is not None:
                result.append((partner[0], self._folded_entry(value, partner[1])))
            elif key in kept:
                result.append((key, kept[key]))
            elif returns:
                result.append((key, value))
        _put_entries(container, result + news)

    def _has_moved(self, container):
        """Tell whether what holds this container got the entry elsewhere, as by another key."""
        for each in self._places:
            entries = _entries(each)
            if any(value is container for _, value in entries):
                olds = dict(self._befores[id(each)])
                if any(key not in olds or id(value) in self._grown for key, value in entries):
                    return True
        return False

    def _folded_entry(self, old, new):
        """Return what stands in an entry: the old object with the new one's content, or the new."""
        if old is new or not _is_plain_instance(old) or not _is_plain_instance(new) or (
                _is(new, tuple) or _container_kind(new) or type(new) is _LRU_CACHE):
            return new
        olds, news = type(old), type(new)
        if olds is not news:
            # Each object has its own class, such as Celery's tasks.
            if id(news) in self._apply.known:
                return new
            self._apply.fold_class(olds, news)
        return self._apply.fold_instance(old, new)

    def put_before(self, later):
        """Put what a new definition registered in front of what those below it have registered.

        `later` are the ids of what these have made.
        """
        # In these it has its place already.
        taken = set(map(id, self.taken))
        for container in self._places if later else ():
            if id(container) in taken:
                continue
            before, now = self._befores[id(container)], _entries(container)
            news, rest = _gained(before, now, _KEY)
            at = next((i for i, (key, value) in enumerate(rest) if _leads_to(value, later)), None)
            if news and at is not None and rest == now[:len(rest)]:
                _put_entries(container, rest[:at] + news + rest[at:])


def _take_partner(key, olds, news):
    """Take from `news` the entry that comes for an old one: of its key, or of one that is new."""
    found = next((i for i, entry in enumerate(news) if entry[0] == key), None)
    if found is None:
        found = next((i for i, entry in enumerate(news) if entry[0] not in olds), None)
    return None if found is None else news.pop(found)


def _entries(container):
    """Return what a container holds as (key, value) or (id, item)."""
    content = _content(container)
    return list(content.items()) if type(content) is dict else [
        (id(item), item) for item in content]


def _put_entries(container, entries):
    """Let a container hold some entries, in their order."""
    content = _content(container)
    _restore_container(container, dict(entries) if type(content) is dict else type(content)(
        item for _, item in entries))


_KEY = operator.itemgetter(0)       # of an entry


def _leads_to(value, targets, depth=3):
    """Tell whether an entry holds one of some objects, given by id, by itself or in a wrapper."""
    if id(value) in targets:
        return True
    # A container is a place of its own: only what is taken out of it leads further.
    if depth == 0 or _is(value, types.ModuleType) or _container_kind(value):
        return False
    if _is(value, tuple):
        inners = list(tuple.__iter__(value))
    elif _is(value, weakref.ref):
        inners = [value()]
    elif type(value) is types.MethodType:
        inners = [value.__func__, value.__self__]
    elif _is(value, _WRAPPERS):
        inners = list(_wrapped_by(value))
    elif type(value).__flags__ & HEAP_TYPE:
        inners = _leads_of(value, targets)
        depth = min(depth, 2)
    else:
        return False
    return any(_leads_to(each, targets, depth - 1) for each in inners)


def _leads_of(value, targets):
    """Return what in an instance may lead to a function: not the objects that it works with."""
    cls = type(value)
    fields = list((_get_dict(value) or {}).values())
    fields += [_attribute(value, member.__name__)[0]() for base in cls.__mro__
               for member in vars(base).values() if type(member) is types.MemberDescriptorType]
    # Functions of a class that were defined outside of it, such as Celery's `run`.
    fields += [each for each in map(_unwrapped, vars(cls).values())
               if type(each) is types.FunctionType and "." not in each.__qualname__]
    return [cls] + [each for each in fields
                    if id(each) in targets or _is(each, _WRAPPERS + (type,))]


def _unwrapped(value):
    """Return the function of a staticmethod or classmethod; other values as they are."""
    return value.__func__ if _is(value, (staticmethod, classmethod)) else value


def _is_filled_later(before, value):
    """Tell whether a container of an object has content that others gave it after its birth."""
    return type(before) is type(value) and _container_kind(value) and before and not value


# What frameworks need besides lists and dicts.

class _Flask:
    """Has a Flask app register again: after its first request it refuses to.

    It finds views by name, and has copied what its blueprints registered.
    """

    COPIED = ("before_request_funcs", "after_request_funcs", "teardown_request_funcs",
              "template_context_processors", "url_value_preprocessors", "url_default_functions",
              "error_handler_spec")

    def __init__(self, apply, app, targets):
        self.app = app
        self._apply = weakref.proxy(apply)      # which has us
        self._has_started = app._got_first_request
        self._gone = {name for name, view in app.view_functions.items() if _leads_to(view, targets)}
        self._known = {name: (list(each.deferred_functions), _prefix_of(app, name, each))
                       for name, each in app.blueprints.items()}

    def open(self):
        """Let it register, and forget the URLs of the views that are defined again."""
        self._put(self.app, _got_first_request=False)
        for blueprint in self.app.blueprints.values():
            self._put(blueprint, _got_registered_once=False)
        urls = self.app.url_map
        if self._gone:
            rules = {name: each for name, each in urls._rules_by_endpoint.items()
                     if name not in self._gone}
            matcher = type(urls._matcher)(urls._matcher.merge_slashes)
            for rule in itertools.chain(*rules.values()):
                if not rule.build_only:
                    matcher.add(rule)
            self._put(urls, _rules_by_endpoint=rules, _matcher=matcher, _remap=True)

    def close(self):
        """Register what the blueprints have got meanwhile."""
        for name, (known, prefix) in self._known.items():
            blueprint = self.app.blueprints[name]
            state = blueprint.make_setup_state(self.app, {"url_prefix": prefix, "name": name}, True)
            for function in _gained(known, blueprint.deferred_functions)[0]:
                function(state)
            for each in self.COPIED:
                getattr(self.app, each).pop(name, None)
            blueprint._merge_blueprint_funcs(self.app, name)
            self._put(blueprint, _got_registered_once=True)
        self._put(self.app, _got_first_request=self._has_started)

    def _put(self, obj, **fields):
        """Set attributes of Flask's objects, so that an undo takes it back."""
        for name, value in fields.items():
            self._apply.put(_entry(vars(obj), name), value)


def _flask_apps():
    """Return all Flask apps."""
    kind = getattr(sys.modules.get("flask"), "Flask", None)
    return _instances_of(kind) if kind else []


def _prefix_of(app, name, blueprint):
    """Return the URL prefix that an app gave a blueprint, as far as its rules show it, or None."""
    for function in blueprint.deferred_functions:
        found = dict(zip(function.__code__.co_freevars,
                         map(_cell_value, function.__closure__ or ())))
        end = found.get("endpoint") or getattr(found.get("view_func"), "__name__", None)
        for rule in app.url_map._rules_by_endpoint.get("%s.%s" % (name, end), ()):
            if found.get("rule") and rule.rule.endswith(found["rule"]):
                return rule.rule[:-len(found["rule"])] or None
    return None


def _forget_django_urls():
    """Django looks for views in caches, and in what included files had when they were read."""
    sys.modules["django.urls"].clear_url_caches()
    for each in _instances_of(sys.modules["django.urls.resolvers"].URLResolver):
        for name in ("url_patterns", "urlconf_module"):
            vars(each).pop(name, None)
        each._populated = False


def _forget_fastapi_routes():
    """FastAPI keeps its schema, and the routes of the routers that it includes."""
    for each in _instances_of(sys.modules["fastapi.routing"].APIRouter):
        getattr(each, "_mark_routes_changed", int)()
    for each in _instances_of(sys.modules["fastapi"].FastAPI):
        each.openapi_schema = None


def _forget_kinds():
    """FastAPI keeps of each function whether it is a coroutine or a generator."""
    module = sys.modules.get("fastapi.dependencies.models")
    for value in list(_space_of(module).values()):
        getattr(value, "cache_clear", int)()


def _follow_starlette_handlers():
    """Starlette copies the handlers of exceptions when the first request comes."""
    for app in _instances_of(sys.modules["starlette.applications"].Starlette):
        layer = app.middleware_stack
        while layer is not None:
            for key, handler in app.exception_handlers.items():
                if hasattr(layer, "add_exception_handler") and key not in (500, Exception):
                    layer.add_exception_handler(key, handler)
            layer = getattr(layer, "app", None)


_CACHES = {"starlette.applications": _follow_starlette_handlers,
           "django.urls.resolvers": _forget_django_urls,
           "fastapi.routing": _forget_fastapi_routes}


# --- Kinds: tables ---
# A new object's behaviour goes into the old one by the first row of _FOLD_RULES that fits the two;
# a class of a special kind has more to be done, by the rows of _CLASS_KINDS that fit it. A kind
# that is missing here is a row, and a method of _Apply.

_LRU_CACHE = type(functools.lru_cache()(len))
if _LRU_CACHE is types.FunctionType:
    _LRU_CACHE = type("_NoSuchType", (), {})  # PyPy: closures, which are folded as such


def _is_class_pair(old, new):
    """Tell whether two classes come from one statement, before and after its change."""
    return isinstance(old, type) and isinstance(new, type) and (
        old.__qualname__ == new.__qualname__ and _is_of(old, new.__module__))


def _is_of(cls, module):
    """Tell whether a class was defined in a module; a package may have put its own name on it."""
    return cls.__module__ == module or module.startswith("%s." % cls.__module__)


def _is(value, kinds):
    """As isinstance(), which would ask for __class__: code of a proxy, which may raise."""
    return issubclass(type(value), kinds)


def _are_namesakes_apart(old, new):
    """Tell whether `new` is of another definition than `old`, which had the name by `b = a`."""
    if isinstance(old, type) and isinstance(new, type):
        return old.__name__ != new.__name__ and _has_own_name(old)
    codes = [each.__code__ for each in (old, new) if type(each) is types.FunctionType]
    return len(codes) == 2 and codes[0].co_name != codes[1].co_name and not any(
        "<" in _path_of(each) or each.__code__.co_name == "forward_call"
        or "__wrapped__" in vars(each) for each in (old, new))


def _has_another_name(value, statement):
    """Tell whether a definition takes a name that a function or class had beside its own."""
    return statement is not None and statement.is_definition and _is_definition(value) and (
        value.__name__ != statement.node.name and _has_own_name(value))


def _has_own_name(value):
    """Tell whether a function or class stands in its module under the name that it has itself."""
    return _space_of(sys.modules.get(value.__module__)).get(value.__name__) is value


def _is_definition(value):
    """Tell whether a value is a function or class: its name follows it, its readers do not."""
    return _is(value, (type, types.FunctionType))


_WRAPPERS = (types.FunctionType, types.MethodType, staticmethod, classmethod, property,
             functools.partial, _LRU_CACHE)
_FOLD_RULES = (     # (fits, what to do), the first that fits
    (lambda old, new: type(old) is type(new) is types.FunctionType, _Apply.fold_function),
    (_is_class_pair, _Apply.fold_class),
    (lambda old, new: type(old) is type(new)
     and type(new) in (staticmethod, classmethod, property), _Apply.fold_wrapper),
    (lambda old, new: type(old) is _LRU_CACHE and type(new) in (_LRU_CACHE, types.FunctionType),
     _Apply.fold_lru_cache),
    (lambda old, new: type(old) is types.FunctionType and callable(new)
     and not isinstance(new, type), _Apply.forward),
    (lambda old, new: type(old) is type(new) and _is_plain_instance(new)
     and not _is(new, functools.partial), _Apply.fold_instance),    # what it calls is in no dict
    (lambda old, new: _is_definition(old) and callable(new), _Apply.replace),
)
# Of classes whose fields are more than attributes: what is done beside the attributes, whether
# others copy the fields, and whether the metaclass looks at decorated functions too.
_Kind = record("_Kind", "fits fold has_fields sees_functions")
_CLASS_KINDS = (
    _Kind(lambda cls: hasattr(cls, "_member_map_"), _Apply.fold_enum, False, False),
    _Kind(lambda cls: issubclass(cls, tuple) and hasattr(cls, "_fields"),
          _Apply.fold_named_tuple, False, False),
    _Kind(lambda cls: "__dataclass_fields__" in vars(cls),
          lambda apply, old, new: apply.fold_fields(old, new, _dataclass_fields), True, False),
    _Kind(lambda cls: "__attrs_attrs__" in vars(cls),
          lambda apply, old, new: apply.fold_fields(old, new, _attrs_fields), True, True),
    _Kind(lambda cls: "__pydantic_core_schema__" in vars(cls), _Apply.fold_pydantic, True, True),
    _Kind(lambda cls: type(cls).__setattr__ is type.__setattr__ and any(    # of the program's own
        "__new__" in vars(kind) or "__init__" in vars(kind) for kind in type(cls).__mro__
        if kind.__flags__ & HEAP_TYPE and kind.__module__ not in ("abc", "_py_abc")),
        None, False, True),
)

# 3.14: what makes annotations, which of a module's it makes, what it has made of a class's.
_ANNOTATIONS = ("__annotations__", "__annotate__", "__conditional_annotations__",
                "__annotate_func__", "__annotations_cache__")
_CLASS_SKIPS = {"__dict__", "__weakref__", "__slots__", "_abc_impl", "_abc_registry", "_abc_cache",
                "_abc_negative_cache", "_abc_negative_cache_version"}
_SLOT_TYPES = (types.MemberDescriptorType, types.GetSetDescriptorType)
_SEQUENCES = (list, collections.deque)
_REGISTRIES = (dict, set) + _SEQUENCES
_CONTENTS = {  # by the type's own methods: what a subclass makes of them is not asked
    collections.OrderedDict: lambda each: dict(collections.OrderedDict.items(each)),
    dict: dict.copy,
    type(os.environ): type(os.environ).copy,
    list: list.copy,
    collections.deque: lambda each: list(collections.deque.__iter__(each)),
    set: lambda each: set(set.__iter__(each)),
    bytearray: bytearray.copy,
    type: lambda each: dict(vars(each))}
_REACH = 5000  # objects that are looked at before a statement runs
_INDIRECT = {"globals", "locals", "vars", "__dict__", "setattr", "delattr", "exec"}  # set any name
_IMPORT_NAMES = {*vars(types.ModuleType("")), *_ANNOTATIONS, "__builtins__", "__cached__",
                 "__file__", "__path__"}
_PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))
_CODE_KINDS = 0x20 | 0x80 | 0x200  # CO_GENERATOR, CO_COROUTINE, CO_ASYNC_GENERATOR


def _decorators(statement):
    """Return the keys of a definition's decorators, to be compared."""
    return {_key(each, False) for each in statement.node.decorator_list}


def _kept_class_names(edit, pair, cls):
    """Return the names whose statements in a class body are unchanged, as is their input."""
    if hasattr(cls, "_member_map_"):
        return set()
    pairs = edit.sub_pairs(pair)
    changed = {name for name, was in edit.before.items()
               if was is not edit.space.get(name, _MISSING)}
    changed |= _bound_by(each.new or each.old for each in pairs if each.change not in _LEFT_ALONE)
    kept = _bound_by(each.new for each in pairs if each.change in _LEFT_ALONE
                     and not each.new.names.reads & changed) - changed
    return {_mangled(name, cls.__name__) for name in kept}


def _is_made_by_text(cls, name, value, pair):
    """Tell whether the old class statement had made an attribute: by its body or a decorator."""
    if name in _ANNOTATIONS or pair is None:
        return name in _ANNOTATIONS
    names = {_mangled(each, cls.__name__) for each in _bound_by(pair.old.body)}
    if name in names or name == "__hash__" and value is None:
        # Python makes a class that has __eq__ alone unhashable.
        return True
    return pair.old.decorator_dump != pair.new.decorator_dump and (
        name.startswith("__") and name.endswith("__") and not _has_console_code(value))


def _dataclass_fields(cls):
    """Return {name: what makes a value, if that can be called} of a dataclass's own fields."""
    found = sys.modules["dataclasses"].fields(cls) if "__dataclass_fields__" in vars(cls) else ()
    return {field.name: field.default_factory for field in found}


def _attrs_fields(cls):
    """Return {name: what makes a value, if that can be called} of the fields of an attrs class."""
    found = {}
    for field in vars(cls).get("__attrs_attrs__", ()):
        make = getattr(field.default, "factory", lambda field=field: field.default)
        is_missing = field.default is sys.modules["attr"].NOTHING
        takes_self = getattr(field.default, "takes_self", False)
        found[field.name] = None if is_missing or takes_self else make
    return found


def _pydantic_fields(cls):
    """Return {name: what makes a value, if that can be called} of a model's fields."""
    return {name: None if field.is_required() else functools.partial(
        field.get_default, call_default_factory=True)
        for name, field in getattr(cls, "__pydantic_fields__", {}).items()}


def _same_payload(kept, member):
    """Tell whether an old enum member can stand for a new one: its data part can't change."""
    base = getattr(type(member), "_member_type_", object)
    return base is object or base.__eq__(kept, member) is True


def _combinations(old, new):
    """Yield (old, new) for values of a Flag that have no names, such as A | B.

    A combination keeps its meaning: its members' values may be others now.
    """
    import enum
    flags = old._value2member_map_.items() if issubclass(old, enum.Flag) else ()
    for value, kept in list(flags):
        parts = [each for each in old._member_map_.values() if each._value_
                 and each._value_ & value == each._value_ and each._name_ in new._member_map_]
        try:
            made = new(0)
            for each in parts:
                made |= new._member_map_[each._name_]
        except ValueError:
            continue
        if type(made) is new and sum({each._value_ for each in parts}) == value:
            yield kept, made


def _adopt_member(cls, member):
    """Return a new enum member as a member of the old class."""
    try:
        member.__class__ = cls
        return member
    except TypeError:
        # Up to 3.11, for members that are an int or str too.
        base = cls._member_type_
        adopted = base.__new__(cls, *[member._value_] if isinstance(member._value_, base)
                               else member._value_)
        vars(adopted).update(vars(member), __objclass__=cls)
        return adopted


def _attributes_set(node):
    """Return {name: value node} of what a method assigns to its first parameter's attributes."""
    import ast
    values = {id(target): each.value for each in ast.walk(node)     # None: it is only declared
              if isinstance(each, (ast.Assign, ast.AnnAssign))
              for target in (each.targets if isinstance(each, ast.Assign) else [each.target])}
    args = getattr(node.args, "posonlyargs", []) + node.args.args
    return {each.attr: values.get(id(each), each) for each in ast.walk(node)
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
            and args and getattr(each.value, "id", None) == args[0].arg
            and values.get(id(each), each) is not None}


def _fresh_value(node):
    """Return the value of a literal, a new one for `list()`, `dict()`, `set()`, else _MISSING."""
    if type(node).__name__ == "Call" and not node.args and not node.keywords:
        makers = {"list": list, "dict": dict, "set": set}
        return makers.get(getattr(node.func, "id", None), lambda: _MISSING)()
    return _literal(node)


# --- Who imports whom ---
# Edits are applied in the order in which the import system would come to them, so the apply phase
# asks where an import statement leads, also in modules that are not edited: those are not parsed,
# as a thousand of them may lie between two edits. Afterwards it asks the other way: who holds a
# value that was imported from what has changed?

class _Follower(record("_Follower", "name space")):
    """A module that is not edited, where an edit is expected."""

    pairs = ()

    def runs(self, statement):
        """Nothing of it runs in this transaction."""
        return False


def _with_parents(name):
    """Return ["a", "a.b", "a.b.c"] for "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:i + 1]) for i in range(len(parts))]


def _full_name(level, name, space):
    """Return the full name of the module that `from ...name import` leads to in a namespace."""
    if not level:
        return name
    parts = (space.get("__package__") or "").split(".")
    return ".".join(parts[:len(parts) - level + 1] + ([name] if name else []))


def _led_to(imports):
    """Yield the modules that imports may lead to, each after the packages that it lies in."""
    for base, names in imports:
        yield from _with_parents(base)
        for name, _ in names:
            yield "%s.%s" % (base, name)


# An import is (module, [(name, name that it is bound to), ...]); of `import a.b` the list is empty.

def _imports_of(nodes, space):
    """Yield the imports in nodes, but for those of functions and of type checkers."""
    import ast
    for node in nodes:
        kind = type(node).__name__
        if kind == "Import":
            yield from [(alias.name, []) for alias in node.names]
        elif kind == "ImportFrom":
            yield _full_name(node.level, node.module, space), [
                (alias.name, alias.asname or alias.name) for alias in node.names]
        elif kind in ("If", "Try", "With", "ExceptHandler") and not _tests(node, "TYPE_CHECKING"):
            yield from _imports_of(ast.iter_child_nodes(node), space)


_IMPORT = Lazy(lambda: re.compile(
    rb"[\n:;][ \t]*(?:lazy[ \t]+)?(?:from[ \t]+(\.*)[ \t]*([\w.]*)[ \t]+import[ \t]+"
    rb"(\([^)]*\)|[^\n#;]*)|import[ \t]+([^\n#;]*))"))


def _imports_in(text, space):
    """Return the imports of a text, also those of its functions."""
    return [(_full_name(level, base, space), names)
            for level, base, names in _written_imports(text)]


@functools.lru_cache(maxsize=4096)
def _written_imports(text):
    """Return (level, module, names) of the imports in a text, found fast, without parsing."""
    imports = []
    for found in _IMPORT.finditer(b"\n" + text):
        dots, base, names, modules = [
            each.decode("utf-8", "replace") for each in found.groups(b"")]
        imports += [(0, each.split()[0], []) for each in modules.split(",") if each.split()]
        if names:
            words = [each.split() for each in names.strip("()").split(",")]
            if re.search(r"[^\w\s(),]", names, re.A):
                # A comment, or letters that are not ASCII: it may be any name.
                words.append("*")
            imports.append((len(dots), base, [(each[0], each[-1]) for each in words if each]))
    return imports


def _imports_of_unchanged(name):
    """Return the imports of a module that is not edited; or of a new one in an own package."""
    known = HOT.known.get(name)
    if name in sys.modules:
        text, space = known and known.text, _space_of(sys.modules[name])
    else:
        text, space = _text_of_new(name)
    return _imports_in(text or b"", space)


def _text_of_new(name):
    """Return (text, namespace) of a module not imported yet, if its package is the program's."""
    parts = name.split(".")
    for k in range(len(parts) - 1, 0, -1):
        known = HOT.known.get(".".join(parts[:k]))
        if known is None:
            continue
        base = os.path.join(os.path.dirname(known.path), *parts[k:])
        for path, package in ((base + ".py", ".".join(parts[:-1])),
                              (os.path.join(base, "__init__.py"), name)):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    return file.read(), {"__package__": package}
    return b"", {}


def _import_index(edits):
    """Return {module: {name of one of the program's that imports from it: set of names}}."""
    index = collections.defaultdict(lambda: collections.defaultdict(set))
    texts = [(name, known.text or b"") for name, known in list(HOT.known.items())]
    for name, text in texts + [(edit.name, edit.text) for edit in edits]:
        for base, names in _imports_in(text, _space_of(sys.modules.get(name))):
            index[base][name].update(imported for imported, _ in names)
    return index


def _public(space):
    """Return the names that `from module import *` takes."""
    names = space.get("__all__")
    if not _is(names, (list, tuple)):
        names = [name for name in space if not name.startswith("_")]
    return set(names)


def _imported_values(source, space, edit, before):
    """Return {name: value} of what a module imported from another one and is another now there."""
    found, public, olds = {}, _public(edit.space), _public(before)
    stars = (public | olds) - (source.names - {"*"})
    imports = [(module_name, name, own) for module_name, names in _imports_of(
        [each.node for each in source.statements], space) for name, own in names]
    spaces = [_space_of(sys.modules.get(each)) for each, imported, _ in imports if imported == "*"]
    for module_name, imported, bound in imports:
        is_star = imported == "*"
        names = zip(stars, stars) if is_star else [(imported, bound)]
        for name, own in names if module_name == edit.name else ():
            # Only what the importer still has from there; of what a star brings also new names.
            live = space.get(own, _MISSING)
            was = _MISSING if is_star and name not in olds else before.get(name, _MISSING)
            now = _MISSING if is_star and name not in public else edit.space.get(name, _MISSING)
            if live is not was or now is was or not is_star and (
                    now is _MISSING or was is _MISSING):
                continue
            if now is _MISSING:
                # Another star import may bring it.
                now = next((each[name] for each in spaces if name in _public(each)), now)
            if now is not live:
                found[own] = now
    return found


def _pure_value(node, space):
    """Return what a pure expression gives in a namespace, or _MISSING."""
    import ast
    code = compile(ast.Expression(body=node), "<expression>", "eval")
    try:
        return eval(code, {"__builtins__": {}}, space)
    except Exception:
        return _MISSING


def _is_plain_equal(a, b):
    """Tell whether two values are one, or plain and equal, or tuples of such."""
    if type(a) is tuple is type(b):
        return len(a) == len(b) and all(map(_is_plain_equal, a, b))
    return a is b or type(a) is type(b) and type(a) in _PLAIN_TYPES and repr(a) == repr(b)


def _own_code_changed(edit, methods):
    """Return the names of functions whose own code changed, and of classes with such `methods`.

    Not of those where only a function that is nested and nests none changed, as the wrapper that a
    decorator returns.
    """
    names = set()
    for pair in edit.pairs:
        pairs = [pair]
        if pair.change in ("body", "class") and pair.new.kind == "ClassDef" and pair.old:
            pairs = [each for each in edit.sub_pairs(pair) if not methods.isdisjoint(
                each.new.binds if each.new else ())]
        if any(each.change == "body" and each.new.is_function and (
                _key(each.old.node.body, _nests_none) != _key(each.new.node.body, _nests_none))
                for each in pairs):
            names.add(pair.new.node.name)
    return names


def _nests_none(function):
    """Tell whether no other function stands in one, as in the wrapper of a decorator."""
    return len(list(_functions_below(function))) == 1


_RUN_AT_ONCE = {"__init_subclass__", "__new__", "__init__", "__set_name__", "__call__",
                "__prepare__", "__class_getitem__", "__post_init__"}
_RUN_BELOW = {"__init_subclass__", "__class_getitem__"}


def _evaluated_nodes(node, is_lazy):
    """Yield what a definition, or one in its body, has evaluated and nobody evaluates anew.

    Where annotations are lazy only decorators that are not known evaluate them.
    """
    pure = list(filter(_is_pure_expression, _default_nodes(node).values())) if (
        hasattr(node, "args")) else []
    if hasattr(node, "args") and is_lazy and _is_transparent(node):
        yield from node.decorator_list + [
            each for each in _default_nodes(node).values() if each not in pure]
    else:
        yield from [each for each in _executed_children(node) if each not in pure]
    for each in node.body if type(node).__name__ == "ClassDef" else ():
        if hasattr(each, "decorator_list"):
            yield from _evaluated_nodes(each, is_lazy)
        elif type(each).__name__ == "AnnAssign" and not is_lazy:
            yield each.annotation


def mentions_at_import(text, names):
    """Tell fast, without parsing it, whether a text may use some names outside of functions."""
    words = re.compile(rb"(?<![\w\x80-\xff])(?:%s)(?![\w\x80-\xff])" % b"|".join(
        re.escape(name).encode() for name in names if _is(name, str)))
    if not words.search(text):
        return False
    rest = _IMPORT.sub(b"", _FUNCTION.sub(rb"\2", b"\n%s\n" % text))
    return words.search(rest) is not None


# A function: group 2 is its head, of one line or up to one that ends with "):" or ") -> it:" and
# is deeper or begins with ")": what follows `def f(): return 1` is not of it.
_FUNCTION = Lazy(lambda: re.compile(
    rb"(?m)^([ \t]*)((?:async )?def .*?(?:\n(?:\1[ \t].*\n)*?\1(?:[ \t].*)?\).*)??"
    rb":[ \t\r]*(?:#.*)?\n)(?:(?:\1[ \t].*)?\n)+"))


def _names_at_import(code):
    """Return the names that code uses, with classes and comprehensions in it, not functions."""
    return set(code.co_names).union(*[_names_at_import(each) for each in _nested_codes(code)
                                      if not each.co_flags & CO_OPTIMIZED or (
                                          each.co_name.endswith(("comp>", "<genexpr>")))])


# --- History, patch and hooks ---
# A reload, a patch and an unpatch each leave a _Change, whose journal takes it back. Changes are
# numbered and may be taken back in any order, unless they touched the same places.

class _Change:
    """One transaction that is over: what it did, and what takes it back."""

    def __init__(self, number, kind, names, journal, target):
        self.number, self.kind, self.names, self.journal = number, kind, names, journal
        self.target = target            # of a patch: the function or class
        self.when = time.time()
        self.who = threading.current_thread().name

    def __repr__(self):
        return "%3d  %s  %s  %s %s" % (
            self.number, time.strftime("%H:%M:%S", time.localtime(self.when)), self.who, self.kind,
            shorten(", ".join(self.names), 200))


class _Changes(list):
    """Changes, one a line."""

    def __repr__(self):
        return "\n".join(map(repr, self)) or "no changes"


_HISTORY = 50   # so many changes can be taken back; older ones hold memory


def _hot_remember(kind, names, journal, target=None):
    """Put a transaction on record; called under the lock."""
    if not journal.touched:
        return None
    HOT.count += 1
    change = _Change(HOT.count, kind, names, journal, target)
    HOT.changes.append(change)
    del HOT.changes[:-_HISTORY]
    return change


def changes():
    """Return the last reloads and patches that are in force, the newest last; prints as a list."""
    with HOT.lock:
        return _Changes(HOT.changes)


def undo(number=None):
    """Take back the newest change, or that with a number of changes(), and return what it was.

    A change that a newer one covers can't be taken back alone: a ReloadError names the newer one.
    """
    with HOT.lock:
        found = [each for each in HOT.changes if number in (None, each.number)]
        if not found:
            raise ReloadError("there is no change %s to take back" % (
                "at all" if number is None else number))
        change = found[-1]
        newer = HOT.changes[HOT.changes.index(change) + 1:]
        covering = [each for each in newer if each.journal.touched & change.journal.touched]
        if covering:
            raise ReloadError("a newer change covers it; take that back first: %r" % covering[-1])
        HOT.changes.remove(change)
        errors = change.journal.undo()
        if errors:
            raise ReloadError("taken back, except for %r" % errors)
        return change


def on_reload(cls, function):
    """Have `function(instance)` called for each live instance when `cls` was changed by a reload.

    For classes of others; one's own may have a method `__reload__(self)`, and a module a function
    `__reload__(old)`, which gets the previous values of the names. All run inside the
    transaction: what they raise undoes it.
    """
    if not _is(cls, type) or not callable(function):
        raise TypeError("expected a class and a function, not %r and %r" % (cls, function))
    HOT.hooks.setdefault(weakref.ref(cls, HOT.hooks.pop), []).append(function)


def patch(old, new=None):
    """Give the function or class `old` the behaviour of `new`, wherever it is held.

    Returns a callable that puts back exactly what was. As a decorator, `@patch(m.step)`, it binds
    the name to the patched `old`; then `unpatch(m.step)` takes the newest patch back. A name, a
    module and a place in a class stay those of `old`. A pair that can't work is a TypeError and
    changes nothing. May be called in any thread.
    """
    target = patch_target(old)
    if new is None:
        return lambda new: patch(old, new) and old
    source = patch_target(new)
    if isinstance(target, type) is not isinstance(source, type):
        raise TypeError("can't make %r behave like %r: patch a function with a function and a "
                        "class with a class" % (old, source))
    with HOT.lock:
        apply = _Apply(ReloadReport())
        apply.patch(target, source)
        if type(old) is _LRU_CACHE:
            old.cache_clear()
            apply.journal.on_undo(old.cache_clear)
        change = _hot_remember("patch", [target.__qualname__], apply.journal, target)
    return lambda: change in HOT.changes and undo(change.number) and None


def unpatch(old):
    """Take back the newest patch of `old`, or what was typed over the file's version of it."""
    with HOT.lock:
        target = patch_target(old)
        for change in reversed(HOT.changes):
            if change.target is target:
                undo(change.number)
                return
        if type(target) is not types.FunctionType or not _bring_files_version(target):
            raise ValueError("%r is not patched" % (old,))


def _bring_files_version(typed):
    """Bind a name of a file to the file's function again, over which `typed` was typed.

    As "lost", the change of a definition that somebody took away. Return whether there is one.
    """
    for name, module, _ in own_modules():
        space, known = _space_of(module), _known_of(name, module)
        for key in [key for key, value in list(space.items()) if value is typed][:1]:
            found = _statement_of(module, key)
            if found is not None and found[1].is_function and not (
                    _is_in_file(typed.__code__, found[0])):
                edit = _unedited(name, known)
                last = _last_binders(edit.new.statements)[key]
                edit.pairs = [pair._replace(change="lost") if pair.new is last else pair
                              for pair in edit.pairs]
                apply = _Apply(ReloadReport(), [edit])
                apply.commit()
                _hot_remember("unpatch", ["%s.%s" % (name, key)], apply.journal)
                return True
    return False


def patch_target(value):
    """Return the function or class that a patch of `value` changes."""
    found = value
    if _is(value, _WRAPPERS) and not _is(value, functools.partial):
        found = next(_functions_in(value), None)
    if type(found) is types.FunctionType or _is(found, type) and found.__flags__ & HEAP_TYPE:
        return found
    raise TypeError("expected a Python function, method or class, not %r, which is built in or "
                    "no definition; to replace it, bind its name anew" % (value,))


# --- Functions ---
# An old function gets new code where it can: it is given the new version's code object. Where it
# can't, as the variables of its closure are others, its code becomes that of a forwarder: it calls
# the new function, which is a constant in it.

def _function_like(function, code, cells):
    """Return a new function with other code and cells, and all else of an old one."""
    new = types.FunctionType(code, function.__globals__, function.__name__,
                             function.__defaults__, tuple(cells) or None)   # (): PyPy refuses it
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(vars(function))
    # 3.6 to 3.10: the code does not know it.
    new.__qualname__ = function.__qualname__
    _annotations(new)[1](_annotations(function)[0]())
    return new


def _doc_of(code):
    """Return the docstring of a function's code."""
    first = code.co_consts[0] if code.co_consts else None
    is_doc = sys.version_info < (3, 14) or IS_PYPY or code.co_flags & 0x4000000
    return first if type(first) is str and is_doc and code.co_name != "<lambda>" else None


def _live_defaults(function):
    """Return {parameter: default} of a function."""
    code = function.__code__
    names = code.co_varnames[:code.co_argcount]
    return dict(zip(reversed(names), reversed(function.__defaults__ or ())),
                **function.__kwdefaults__ or {})


def _as_defaults(code, values):
    """Return (__defaults__, __kwdefaults__) from {parameter: default}."""
    names = code.co_varnames[:code.co_argcount]
    more = code.co_varnames[code.co_argcount:code.co_argcount + code.co_kwonlyargcount]
    return (tuple(values[name] for name in names if name in values) or None,
            {name: values[name] for name in more if name in values} or None)


def _new_defaults(found, function):
    """Return (__defaults__, __kwdefaults__) for a live closure that gets new code.

    A default whose text is another one must be a literal; else ValueError.
    """
    import ast
    kept = _kept_defaults(found.old, found.new, function)
    return _as_defaults(found.code, {
        name: kept[name] if name in kept else ast.literal_eval(node)
        for name, node in _default_nodes(found.new).items()})


def _kept_defaults(old, new, function):
    """Return {parameter: live value} of the defaults of a `def` that stay as they are.

    Their text is the same; where there is no old text, they may well be what the new one says.
    """
    olds, live = old and _default_nodes(old), _live_defaults(function)
    return {name: live[name] for name, node in _default_nodes(new).items() if name in live and (
        not _is_unlike(_literal(node), live[name]) if olds is None
        else name in olds and _key(olds[name], False) == _key(node, False))}


def _with_consts(code, consts):
    """Return code with other constants."""
    if hasattr(code, "replace"):
        return code.replace(co_consts=consts)
    return types.CodeType(  # type: ignore  # 3.6, 3.7
        code.co_argcount, code.co_kwonlyargcount, code.co_nlocals, code.co_stacksize,
        code.co_flags, code.co_code, consts, code.co_names, code.co_varnames,
        code.co_filename, code.co_name, code.co_firstlineno, code.co_lnotab,
        code.co_freevars, code.co_cellvars)


def _is_in_file(code, source):
    """Tell whether a function's code was compiled from a source's file, not by us."""
    return code.co_name not in ("forward_call", "<module>") and not _makes_annotations(code) and (
        code.co_filename == source.path
        or os.path.realpath(code.co_filename) == os.path.realpath(source.path))


def _swap(function, code, defaults, kwdefaults):
    """Give a function its code and defaults so that no call gets some old and some new.

    They are three attributes, and another thread may call between two assignments: meanwhile the
    function forwards, whatever its defaults, to a complete copy of the new version.
    """
    if function.__defaults__ is not defaults or function.__kwdefaults__ is not kwdefaults:
        whole = types.FunctionType(code, function.__globals__, function.__name__, defaults,
                                   function.__closure__)
        whole.__kwdefaults__ = kwdefaults
        _assign_code(function, _forwarder(function, whole)[0])
        function.__defaults__ = defaults
        function.__kwdefaults__ = kwdefaults
    _assign_code(function, code)


def _assign_code(function, code):
    """Set a function's code, also one of another kind, without the warning of that."""
    if sys.version_info >= (3, 13) and (function.__code__.co_flags ^ code.co_flags) & _CODE_KINDS:
        import warnings
        # 3.13 deprecates other kinds of code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            function.__code__ = code
    else:
        function.__code__ = code


def _forwarder(old, new):
    """Return (code, defaults, kwdefaults) that make `old` call `new`, a constant in the code."""
    is_async = bool(getattr(getattr(new, "__code__", None), "co_flags", 0) & CO_COROUTINE)
    code = _forwarder_template(len(old.__code__.co_freevars), is_async)
    consts = tuple(new if const == _TARGET else const for const in code.co_consts)
    return _with_consts(code, consts), old.__defaults__, old.__kwdefaults__


_TARGET = "target of forward_call"


@functools.lru_cache(maxsize=None)
def _forwarder_template(closure_size, is_async):
    """Return the code of a forwarder to _TARGET, for a function with so many cells."""
    cells = ", ".join("cell%d" % i for i in range(closure_size))
    kind, target = ("async def", "await target") if is_async else ("def", "target")
    source = ("def outer(%s):\n %s forward_call(*args, **kwargs):\n  if 0: (%s)\n"
              "  target = %r\n  return %s(*args, **kwargs)\n return forward_call\n" % (
                  cells, kind, cells, _TARGET, target))
    space = {}
    exec(compile(source, "forward_call of " + __name__, "exec"), space)
    return space["outer"](*[None] * closure_size).__code__


def _is_from_console(function):
    """Tell whether a function was typed at a prompt: its code is in no file."""
    code = function.__code__
    if code.co_name == "forward_call":
        return any(map(_has_console_code, code.co_consts))
    name = code.co_filename
    return name.startswith("<") and name != "<string>" and not name.startswith("<frozen")


def _has_console_code(value):
    """Tell whether something that was typed at a prompt is in a value."""
    return any(map(_is_from_console, _functions_in(value)))


def _wrapped_by(value):
    """Return the callables inside a wrapper: a property, a partial, a closure, a method, ..."""
    fields = _get_dict(value) if _is_plain_instance(value) else {}
    inners = [getattr(value, name, None) if _is(value, _WRAPPERS) else fields.get(name)
              for name in ("__wrapped__", "__func__", "fget", "fset", "fdel", "func")]
    if type(value) is types.FunctionType:
        inners += map(_cell_value, value.__closure__ or ())
    return filter(callable, inners)


def _get_dict(value):
    """Return an object's attributes without asking its class; None where it has none."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def _functions_in(value, depth=4):
    """Yield the Python functions which a class, a wrapper or a function consists of."""
    if is_python_function(value):
        yield value
    inners = list(vars(value).values()) if _is(value, type) else _wrapped_by(value)
    for inner in inners if depth else ():
        if not _is(inner, type):
            yield from _functions_in(inner, depth - 1)


def _holds(new, old, depth=3):
    """Tell whether a wrapper is made around `old`: folding it into `old` would never end."""
    return depth > 0 and any(inner is old or _holds(inner, old, depth - 1)
                             for inner in _wrapped_by(new))


def _is_plain_instance(value):
    """Tell whether a class statement made its class, and its attributes are in a dict."""
    return type(value).__flags__ & HEAP_TYPE and not _is(value, (type, types.ModuleType)) and (
        type(_get_dict(value)) is dict)


# --- Classes ---
# A class is asked by its own dict and by type's methods, never by getattr: a metaclass or a
# descriptor of the program would run. The tree of subclasses leads to every class that is alive.

def _slots(cls):
    """Return the names of the slots of a class, and whether its instances have a dict."""
    own = {name for name, value in vars(cls).items()
           if isinstance(value, types.MemberDescriptorType)}
    return own | {name for base in cls.__mro__ for name in ("__dict__", "__weakref__")
                  if name in vars(base) and base.__flags__ & HEAP_TYPE}


def _own_bases(cls):
    """Return the classes that a class consists of, but for those of libraries."""
    return [base for base in cls.__mro__ if not _is_library_module(base.__module__)]


def _members(cls):
    """Return the descriptors of the slots that its instances have."""
    return [value for base in _own_bases(cls) for value in vars(base).values()
            if type(value) is types.MemberDescriptorType]


def _all_classes(base=object):
    """Return a class and every one that has been derived from it; without one, all there are."""
    found, todo = {id(base): base}, [base]
    while todo:
        for cls in type.__subclasses__(todo.pop()):
            if id(cls) not in found:
                found[id(cls)] = cls
                todo.append(cls)
    return list(found.values())


def _instances_of(cls):
    """Return the live objects of a class and of those derived from it."""
    return _instances(*_all_classes(cls))


def _instances(*classes):
    """Return the live objects whose class is exactly one of `classes`."""
    # Before 3.9 the collector does not know that instances refer to their class.
    is_known = sys.version_info >= (3, 9) or not classes
    found = _may_refer_to(classes) if is_known else gc.get_objects()
    # No bytecode for each object: beside busy threads that would take a hundred times as long.
    is_one = set(map(id, classes)).__contains__
    instances = list(itertools.compress(found, map(is_one, map(id, map(type, found)))))
    # Up to 3.10 it has this frame in it: a cycle, and the collector is off.
    del found
    return instances


def _forget_subclasses():
    """Make every ABC and every singledispatch function ask anew what is a subclass of what."""
    import abc
    for cls in _all_classes():
        if "_abc_impl" in vars(cls):
            cls._abc_caches_clear()
        elif "_abc_cache" in vars(cls):
            # 3.6, PyPy.
            cls._abc_cache.clear()
    # There the classes that are no subclasses are forgotten at the next registration.
    abc.ABCMeta("_", (), {}).register(int)
    for function in _functions_of([vars(functools)]):
        if hasattr(function, "_clear_cache"):
            function._clear_cache()


# --- Namespaces and containers ---
# A container is what _CONTENTS names: its content is read and written by that type's own methods,
# so no code of a subclass runs.

def _container_kind(value):
    """Return the type in _CONTENTS that a value is of, or None: it is no container."""
    return next((kind for kind in _CONTENTS if _is(value, kind)), None)


def _content(container):
    """Return a copy of what a container holds: a dict, list, set, bytearray or class."""
    return _CONTENTS[_container_kind(container)](container)  # type: ignore[operator]


def _restore_container(container, before, after=None):
    """Put back what a container, or a class, held; with `after`, only what is as there."""
    now = _content(container)
    is_whole, after = after is None, now if after is None else after
    if type(before) is dict:
        for key in set(before) | set(after):
            was, ours = before.get(key, _MISSING), after.get(key, _MISSING)
            if was is not ours and now.get(key, _MISSING) is ours and key not in _CLASS_SKIPS:
                _put_item(container, key, was)
        if is_whole and not _is(container, type) and list(_content(container)) != list(before):
            for key, value in before.items():
                # All go to the end, one after the other, and so into the old order.
                _put_item(container, key, _MISSING)
                _put_item(container, key, value)
    elif type(before) is set:
        set.difference_update(container, set(after) - set(before))
        set.update(container, set(before) - set(after))
    elif is_whole:
        if list(map(id, now)) != list(map(id, before)):
            _replace_items(container, before)
    else:
        # What came goes; what went returns, as near to its place as the others allow.
        gone = set(map(id, _gained(before, after)[0]))
        items = [item for item in now if id(item) not in gone]
        for item in _gained(after, before)[0]:
            at = next(i for i, each in enumerate(before) if each is item)
            items.insert(min(at, len(items)), item)
        _replace_items(container, items)


def _put_item(container, key, value):
    """Write to a dict, or an attribute of a class; what is _MISSING is taken away."""
    if _is(container, type):
        _attribute(container, key)[1](value)
    elif value is _MISSING:
        _container_kind(container).__delitem__(container, key)
    else:
        _container_kind(container).__setitem__(container, key, value)


def _replace_items(items, others):
    """Put others in the place of all items of a list, bytearray or deque."""
    kind = _container_kind(items)
    if kind is collections.deque:
        kind.clear(items)
        kind.extend(items, others)
    else:
        # At once: nobody sees it without its items.
        kind.__setitem__(items, slice(None), others)


def _modules_named(space, names):
    """Return the modules that names in a namespace lead to, as in `package.module`."""
    found, todo = {}, [space]
    while todo:
        for module in _values_of(todo.pop(), names):
            if type(module) is types.ModuleType and module not in found:
                found[module] = True
                todo.append(vars(module))
    return list(found)


def _values_of(space, names):
    """Return the values that some names have in a namespace, as far as it has them."""
    return [space[name] for name in names if name in space]


def _reachable(values):
    """Yield the containers, instances, classes and functions that code with `values` may use."""
    todo = collections.deque(values)
    seen = {}
    while todo and len(seen) < _REACH:
        value = todo.popleft()
        if type(value) not in _PLAIN_TYPES and id(value) not in seen:
            seen[id(value)] = value
            own, inners = _reached_from(value)
            yield from own
            todo.extend(itertools.islice(inners, _REACH))


def _reached_from(value):
    """Return ([what of a value may change], what it leads to)."""
    kind = _container_kind(value)
    if is_python_function(value):
        inners = [vars(value), value.__defaults__, value.__kwdefaults__]
        inners += map(_cell_value, value.__closure__ or ())
        if _is_library(value.__code__.co_filename):
            return [], inners
        return [value], inners + list(_read_by(value.__code__, value.__globals__))
    if kind is type:
        own = _own_bases(value) + _own_bases(type(value))
        return own, [inner for cls in [value] + own for inner in vars(cls).values()]
    if _is(value, _WRAPPERS + (types.BuiltinMethodType,)):
        return [], list(_wrapped_by(value)) + [
            getattr(value, name, None) for name in ("__self__", "args", "keywords")]
    inners = _items(value, kind)
    if kind in (type(value), type(os.environ)):
        return [value], inners
    if _is_data(value):
        return [value], itertools.chain(inners, (_get_dict(value), type(value)))
    return [], inners


def _items(value, kind):
    """Return what is in a container, a tuple or a frozenset."""
    for each in (tuple, frozenset):
        if _is(value, each):
            return each.__iter__(value)
    content = _content(value) if kind not in (None, bytearray) else ()
    return content.values() if type(content) is dict else content


def _is_data(value):
    """Tell whether the attributes of an object may be put back.

    Of the standard library's objects only where they compare by value: the state of a lock, a queue
    or an event loop is not ours, threads may have come to wait for it.
    """
    cls = type(value)
    path = _space_of(sys.modules.get(cls.__module__)).get("__file__")
    if _is_library(path):
        return cls.__eq__ is not object.__eq__ or "-packages" in str(path)
    return not _is(value, types.ModuleType)


def _read_by(code, space):
    """Yield the global values that a code object, or one nested in it, names."""
    yield from _values_of(space, code.co_names)
    for module in _modules_named(space, code.co_names):
        yield from _values_of(vars(module), code.co_names)
    for nested in _nested_codes(code):
        yield from _read_by(nested, space)


def _stored_names(code, kind, how=("STORE_", "DELETE_")):
    """Return the names that code assigns or deletes, where `kind` is GLOBAL, ATTR or NAME."""
    import dis
    names = {each + kind for each in how}
    if not any(dis.opmap[name] in code.co_code for name in names):
        # Most have none, and to look at each instruction costs.
        return []
    return [step.argval for step in dis.get_instructions(code) if step.opname in names]


def _stored_attributes(code):
    """Return the names of attributes that code assigns, and "setattr" with all texts if it may."""
    names = set(_stored_names(code, "ATTR"))
    return names.union(code.co_consts, ["setattr"]) if "setattr" in code.co_names else names


# --- References: who holds an object that another one has taken the place of ---
# A registry that was filled anew has the new class or enum member, which was folded into the old
# one: each list, dict, set, cell or instance that holds it gets the old one, in a list once.

def _held_elsewhere(pairs):
    """Return the pairs whose first object something else may hold too."""
    if not hasattr(sys, "getrefcount"):
        # PyPy can't count references.
        return pairs
    # A pair that nobody else holds, to compare with.
    pairs = pairs + [(types.FunctionType(_held_elsewhere.__code__, {}), None)]
    counts = [sys.getrefcount(pair[0]) for pair in pairs]
    return [pair for pair, count in zip(pairs[:-1], counts)
            if count > counts[-1] or isinstance(pair[0], type) or weakref.getweakrefs(pair[0])]


def _redirect_holder(journal, holder, moves):
    """Replace in one holder what was moved; `moves` is {id: (object, its successor)}."""
    if type(holder).__name__ == "cell":
        value = _cell_value(holder)
        journal.put(_cell(holder), moves.get(id(value), (0, value))[1])
        return
    if not _container_kind(holder):
        # The attributes of an instance.
        holder = _get_dict(holder)
    is_of_a_class = type(holder) is dict and "__module__" in holder and "__dict__" in holder
    # A class is changed by type's methods, not by its dict.
    if _is(holder, _REGISTRIES) and not is_of_a_class:
        before = _content(holder)
        after = _redirected(before, moves)
        _restore_container(holder, after)
        if not journal.keeps(holder):
            # Else what came and went meanwhile would come back.
            journal.on_undo(functools.partial(_restore_container, holder, before, after))


def _redirected(content, moves):
    """Return a content with successors in the place of what was moved; in a list each once."""
    def now(value):
        return moves.get(id(value), (0, value))[1]
    if type(content) is dict:
        return {now(key): now(value) for key, value in content.items()}
    if type(content) is set:
        return set(map(now, content))
    others = {id(item) for item in content if id(item) not in moves}
    return [now(item) for item in content
            if id(item) not in moves or id(now(item)) not in others]


# --- Live code: what the heap and the stacks hold, and what code does ---
# A look at the heap holds up all other threads for as long as it lasts: so it is a few calls in C,
# made once for all modules of a reload.

def _may_refer_to(values):
    """Return the objects that may refer to some values: those that do, or all there are."""
    # get_referrers is a pass in C, five times as fast as one in Python; but each reference in the
    # heap is compared with each argument.
    if len(values) > 20:
        return gc.get_objects()
    return gc.get_referrers(*values) if values else []


def _functions_of(spaces):
    """Return every live function whose globals are one of some namespaces."""
    ids = set(map(id, spaces))
    return [obj for obj in _may_refer_to(spaces)
            if type(obj) is types.FunctionType and id(obj.__globals__) in ids]


def _top_line(space):
    """Return the line at which the top level of a module runs just now, or None where it is done.

    So it is with a script and its main loop.
    """
    return min((frame.f_lineno for frame in _running_frames() if frame.f_globals is space
                and frame.f_code.co_name == "<module>"
                and frame.f_code.co_filename == space.get("__file__")), default=None)


def _running_frames():
    """Return the frames of all threads, without those of the reload that asks.

    A frame of ours in a list that another one holds would keep alive what the reload worked with.
    """
    own = _running_frames.__code__.co_filename
    return [frame for each in sys._current_frames().values() for frame in _outwards(each)
            if frame.f_code.co_filename != own]


def _outwards(frame):
    """Return the frames of a stack, the outermost first."""
    stack = []
    with suppress(SystemError):
        # PyPy 7.3 raises it for a thread that goes on computing meanwhile.
        while frame is not None:
            stack.append(frame)
            frame = frame.f_back
    return stack[::-1]


def _suspended_frames(codes, running):
    """Return the frames of suspended generators and coroutines, if one of `codes` makes such."""
    if not any(code.co_flags & _CODE_KINDS for code in codes):
        return []
    kinds = {types.GeneratorType: "gi_frame", types.CoroutineType: "cr_frame",
             types.AsyncGeneratorType: "ag_frame"}
    running = set(map(id, running))
    frames = [getattr(obj, kinds[type(obj)]) for obj in gc.get_objects() if type(obj) in kinds]
    return [frame for frame in frames if frame is not None and id(frame) not in running]


def _nested_codes(code):
    """Return the code of the functions, classes and lambdas that code makes."""
    return [const for const in code.co_consts if isinstance(const, types.CodeType)]


def _class_code(code, name):
    """Return the code of the class statement `name` in code; one with type parameters is deeper."""
    return next(each for _, each in _code_paths(_nested_codes(code))
                if each.co_name == name)


def _type_params(space, path):
    """Return {name: type parameter} (PEP 695) that the body of a class finds: its own, and those
    of the classes around it. `path` is the class's, in the module with these names.
    """
    found, outer = {}, None
    for name in path:
        space, outer = vars(space[_mangled(name, outer)]), name
        found.update((each.__name__, each) for each in space.get("__type_params__", ()))
    return found


def _run_body(code, space, cls, params):
    """Run the body of a class statement that has these type parameters, for a class there is.

    Return {name: value} of what it defines.
    """
    known, found = {_mangled(name, cls.__name__): params[name] for name in params}, _ClassSpace(cls)
    known[".type_params"] = ()
    cells = tuple(types.CellType(known[name]) for name in code.co_freevars)     # novm
    exec(code, space, found, **({"closure": cells} if cells else {}))
    for name, value in ("__classcell__", cls), ("__classdictcell__", vars(cls)):
        if name in found:
            _set_cell(found[name], value)
    return {name: value for name, value in found.items() if name not in _MADE_BY_CLASS}


def _code_paths(codes, prefix=""):
    """Yield (path, code) for code objects and all in them; a path is like __qualname__."""
    for code in codes:
        path = prefix + code.co_name
        yield path, code
        is_function = code.co_flags & CO_OPTIMIZED
        yield from _code_paths(_nested_codes(code), path + (".<locals>." if is_function else "."))


def _best_match(code, codes):
    """Return the one of `codes` that does what a live code object does, or None."""
    for other in codes:
        if len(codes) == 1 or _behaviour(other) == _behaviour(code):
            return other
    return None


def _behaviour(code):
    """Return what a code object does, without its lines and file, to be compared."""
    return (code.co_name, code.co_code, tuple(map(_typed, code.co_consts)), code.co_names,
            code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags,
            code.co_argcount, code.co_kwonlyargcount)


def _static_attributes(code):
    """Return the names that the code of a class body says its methods set on self."""
    import dis
    steps = list(dis.get_instructions(code))
    return next((steps[k - 1].argval for k, step in enumerate(steps)
                 if step.argval == "__static_attributes__"), ())


def _typed(const):
    """Return a constant so that 1, 1.0 and True differ, also in tuples; code: what it does."""
    if isinstance(const, types.CodeType):
        return _behaviour(const)
    if isinstance(const, (tuple, frozenset)):
        return type(const), type(const)(map(_typed, const))
    return type(const), repr(const) if isinstance(const, (float, complex)) else const


def _forget_new_modules(before):
    """Take the program's own modules out of sys.modules that a failed reload imported."""
    for name, _, _ in own_modules():
        if name not in before:
            del sys.modules[name]


# === 9. Session tools ========================================================
# The names a user finds at the prompt: TOOLS. Guests puts them into the program's namespace only
# where the name is free, and takes them out again where they are still ours. Each is a plain
# function, called in the thread of a session, by which it finds that session. Below them, each
# with its own head: what runs and its variables, the calls that watch() notes, and the code that
# an editor sends. What only one tool needs is imported where it is called.

def doc(obj=_MISSING):
    """Print the docstring of `obj` below its signature, file and line; doc() lists these tools."""
    import inspect
    import textwrap
    if obj is _MISSING:
        for name, tool in sorted(TOOLS.items()):
            line = "%-13s %s" % (name, inspect.getdoc(tool).partition("\n")[0])
            print(textwrap.fill(line, 79, subsequent_indent=" " * 14))
        return
    print(_headline(obj))
    print(inspect.getdoc(obj) or inspect.getcomments(_definition(obj)) or "no docstring")


def server_print(*values, **options):
    """Print to the stdout that the program had before hotrepl, from any thread."""
    options.setdefault("file", ROUTER.original("stdout"))
    print(*values, **options)


def bg(function, *args, **kwargs):
    """Call `function` in a background thread; return its Job at once. See fg() and jobs()."""
    if not callable(function):
        raise TypeError("expected a callable, found %s; write bg(lambda: ...)" % shorten(function))
    job = JOBS.add(Job(function, *args, **kwargs))
    job.start()
    return job


def fg(job):
    """Return what a Job (or the job of that number) returned, or raise what it raised.

    While it runs, return the job itself. An outcome that was fetched leaves jobs(); what an
    evaluation printed after Ctrl+Z is printed now.
    """
    job = JOBS.find(job)
    if job.state != "running":
        JOBS.drop(job)
        sys.stdout.write(str(job.output))
    return job.outcome()


def jobs():
    """Return the list of background jobs that run or whose outcome nobody fetched."""
    return JOBS.all()


def main_thread(function, *args):
    """Return what function(*args) returns, or raise what it raises, called in the main thread.

    For what only the main thread may do: windows, plots, signal handlers. It is called between
    two bytecodes of whatever the main thread does, as a signal handler is. What it prints comes
    here. Ctrl+C gives up waiting; what has begun by then goes on.
    """
    if not callable(function):
        raise TypeError("expected a callable, found %s; write main_thread(lambda: ...)"
                        % shorten(function))
    return MAIN.call(function, *args)


def stacks(locals=False):
    """Print where every thread is, and every asyncio task where a loop is known; this one last.

    With `locals` also the variables of the program's own functions, shortened.
    """
    for title, stack in _stacks():
        _print_stack(title, stack, locals)
    thread = threading.current_thread()
    _print_stack(_thread_title(thread, thread.ident), _outwards(sys._getframe()), locals)


def frames():
    """Print the program's own functions that run, by thread and task, numbered for at()."""
    _listed.marks = marks = _marks()
    for number, mark in enumerate(marks, 1):
        if number == 1 or marks[number - 2].title != mark.title:
            print(mark.title + ":")
        print("%5d  %s" % (number, mark.text))


def at(where):
    """Return the variables of a call that runs: its attributes, to be read and to be set.

    `where` is the name of the function, or the number that frames() printed last. The call goes
    on meanwhile. LookupError: it has ended, or there are several of that name.
    """
    is_number = isinstance(where, int)
    marks = getattr(_listed, "marks", []) if is_number else _marks()
    fits = [number for number, mark in enumerate(marks, 1) if where == number
            or where in (mark.code.co_name, getattr(mark.code, "co_qualname", ""))]
    if len(fits) == 1:
        return Frame(marks[fits[0] - 1])
    if not fits:
        raise LookupError("frames() has listed no frame %d here" % where if is_number else
                          "no call of %s runs just now; frames() lists those that do"
                          % shorten(where))
    _listed.marks = marks
    raise LookupError("%d calls of %r run, name one by its number: %s" % (
        len(fits), where, "; ".join("%d: %s, %s" % (number, mark.text, mark.title.split(",")[0])
                                    for number, mark in enumerate(marks, 1)
                                    if number in fits[-5:])))


def watch(function, count=10, when=None, quiet=False, seconds=600.0):
    """Print the next calls of a function as they come, a line each; then it is as it was before.

    It ends after `count` calls, of those for which when(call) is true; after `seconds`; on Ctrl+C;
    at the session's end. With `quiet` return at once a list, which fills with the calls. A call has
    args, kwargs, result, exception, seconds (waiting included), thread and again(). Of a cached
    function only those calls that the cache does not answer are seen, and of an asynchronous
    generator the one that makes it.
    """
    calls = Calls(function, count, when, seconds)
    if quiet:
        calls.start(Job(calls.look, calls.append))
        return calls
    try:
        calls.start()
        calls.look(print, rest_s=1.0)
    except KeyboardInterrupt:
        # Without the frames in which we waited.
        raise KeyboardInterrupt from None
    finally:
        calls.stop()
    if calls.problem:
        print("the watch is over" + calls.problem)


def follow(is_wanted=True):
    """Show from now on what the program's own threads print and log; follow(False) ends it."""
    session = current_session()
    if session is None:
        raise RuntimeError("follow() works at a session's prompt")
    session.follow(is_wanted)


def halt():
    """End the server of this session once the last session is gone; the program goes on."""
    session = current_session()
    if session is None:
        raise RuntimeError("halt() works at a session's prompt; elsewhere call the server's stop()")
    session.server.halt()
    print("the server ends when the last session is gone")


class SessionHelp:
    """Show help as an interactive Python does: help(obj), or help() for the browser."""

    def __repr__(self):
        return "Type help() for interactive help, or help(object) for help about object."

    def __call__(self, *args, **kwargs):
        import pydoc
        # With an output, pydoc asks no pager of the process's; with sys.stdin as input it
        # asks by input(), which is the session's.
        session = current_session()
        is_paged = session is not None and session.terminal_size
        output = _Pages(session.terminal_size[1]) if is_paged else sys.stdout
        return pydoc.Helper(sys.stdin, output)(*args, **kwargs)  # type: ignore[arg-type]


class _Pages:
    """What pydoc writes to: it shows on stdout each text page by page."""

    def __init__(self, height):
        self._height = max(height - 1, 2)     # the last line of the terminal is for our question

    def write(self, text):
        """Show the text; after each page ask whether to go on."""
        lines = text.splitlines(True)
        for at in range(0, len(lines), self._height):
            if at and self._is_enough():
                break
            sys.stdout.write("".join(lines[at:at + self._height]))

    def _is_enough(self):
        with suppress(EOFError):
            return input("-- Enter: more, q: enough -- ").strip().lower().startswith("q")
        return True


def _headline(obj):
    """Return the name, signature and place of `obj` in one line."""
    import inspect
    name = getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None)
    try:
        signature = str(inspect.signature(obj))
    except (TypeError, ValueError):
        signature = ""
    try:
        place = "%s:%d" % _find_source(obj)[:2]
    except (TypeError, OSError):
        place = "no source known"
    return "%s%s  [%s]" % (name or type(obj).__name__, signature if name else " instance", place)


def _definition(obj):
    """Return what has source: `obj` with its wrappers off, or its class if it is an instance."""
    import inspect
    obj = inspect.unwrap(obj) if callable(obj) else obj
    has_source = (inspect.isclass(obj) or inspect.isroutine(obj) or inspect.ismodule(obj)
                  or inspect.iscode(obj) or inspect.isframe(obj) or inspect.istraceback(obj))
    return obj if has_source else type(obj)


def _find_source(obj):
    """Return (file name, number of its first line, lines) of what defines `obj`.

    TypeError, OSError: there is no source, as of what is built in.
    """
    import inspect
    definition = _definition(obj)
    typed = _find_typed_class(definition) if inspect.isclass(definition) else None
    if typed is not None:
        # inspect would look in the file of the module.
        return typed
    lines, number = inspect.getsourcelines(definition)
    return inspect.getsourcefile(definition), number, lines


def _find_typed_class(kind):
    """As _find_source, for a class that was typed at a prompt; None for any other.

    The code of its methods names the input that it is of; of a class without methods the newest
    input that defines one of its name is taken.
    """
    import inspect
    import linecache
    files = {each.__code__.co_filename for each in vars(kind).values() if is_python_function(each)}
    files = [each for each in files if each in _remembered or not each.startswith("<")]
    for filename in reversed(list(_remembered)):
        lines = linecache.getlines(filename)
        for index, line in enumerate(lines):
            if re.match(r"\s*class\s+%s\b" % kind.__name__, line) and (
                    filename in files or not files):
                return filename, index + 1, inspect.getblock(lines[index:])
    return None


def show_source(obj):
    """Print the source of `obj` below its headline; the docstring where there is none."""
    try:
        source = "".join(_find_source(obj)[2])
    except (TypeError, OSError):
        return doc(obj)
    print(_headline(obj))
    print(source.rstrip())


# --- Stacks and frames: what runs, and its variables ---
# A frame that somebody holds keeps all its variables alive. So frames() lists marks, which tell
# where a frame was found; at() makes a Frame of one, and each use of that looks for the frame anew,
# on the threads' stacks and, for a task that waits, along what it awaits. All runs in the thread of
# the session that asks, while the frames that it looks at may go on.
#                      reading a variable      setting one
#     from 3.13 on     frame.f_locals          frame.f_locals, which writes through
#     3.6 to 3.12      f_locals, a copy        PyFrame_LocalsToFast puts the copy back
#     PyPy             f_locals, a copy        refused: there is no way

_listed = threading.local()       # .marks: what frames() listed last in this thread
# What finds a frame again, and holds none.
_FrameMark = record("_FrameMark", "frame_id code title text")


class Frame:
    """The variables of a call that runs; each use looks for its frame anew, none is kept."""

    __slots__ = ("_mark",)

    def __init__(self, mark):
        object.__setattr__(self, "_mark", mark)

    @property
    def __dict__(self):
        return _variables(_find_frame(self._mark))

    def __dir__(self):
        return list(self.__dict__)

    def __getattr__(self, name):
        # Not by [name], which raises here: the traceback would hold all the variables.
        value = self.__dict__.get(name, _MISSING)
        if value is _MISSING:
            raise AttributeError("no variable %r in %s" % (name, self._mark.text))
        return value

    def __setattr__(self, name, value):
        code, problem = self._mark.code, ""
        if code.co_flags & CO_OPTIMIZED:
            if name not in code.co_varnames + code.co_cellvars + code.co_freevars:
                problem = "it has no such variable"
            elif IS_PYPY:
                problem = "PyPy has no way to do that"
        if problem:
            # Raised here, where the traceback holds no frame of the program's.
            raise AttributeError("can't set %r in %s: %s" % (name, self._mark.text, problem))
        _variables(_find_frame(self._mark), {name: value})

    def __repr__(self):
        try:
            # 3.6: vars() would raise another exception.
            variables = self.__dict__
        except LookupError:
            return "<%s, has ended>" % self._mark.text
        lines = ["<%s, goes on meanwhile>" % self._mark.text]
        return "\n".join(lines + ["    %s = %s" % each for each in _shown(variables).items()])


def _marks():
    """Return a _FrameMark for each frame of the program's own code: neither ours nor a library's.

    In the order of _stacks(), of one stack the outermost first.
    """
    marks, seen = [], set()
    for title, stack in _stacks():
        for frame in stack:
            code = frame.f_code
            if id(frame) not in seen and _is_program_code(code):
                # A task that runs is on its thread's stack as well.
                seen.add(id(frame))
                marks.append(_FrameMark(id(frame), code, title, "%s, %s:%d" % (
                    getattr(code, "co_qualname", code.co_name), code.co_filename,
                    frame.f_lineno)))
    return marks


def _find_frame(mark):
    """Return the frame, if the call goes on; LookupError."""
    found = next((frame for _, stack in _stacks() for frame in stack
                  if id(frame) == mark.frame_id and frame.f_code is mark.code), None)
    if found is None:
        raise LookupError("%s has ended" % mark.text)
    return found


def _is_program_code(code):
    """Return whether code is the program's own."""
    name = code.co_filename
    return not (name == _THIS_FILE or name.startswith("<frozen ") or _is_library(name))


def _variables(frame, changes=None):
    """Make `changes` to the variables of a frame; return {name: value} of all.

    Before 3.13 f_locals of a function is a copy. The frame keeps it, and with it each value that
    its variables have let go of meanwhile. So we empty it, unless the program has it too, by
    locals().
    """
    variables, changes = frame.f_locals, changes or {}
    found = dict(variables)
    found.update(changes)
    if not (frame.f_code.co_flags & CO_OPTIMIZED and type(variables) is dict):
        variables.update(changes)
        return found
    if changes:
        _write_back(frame, variables, changes)
        variables.update(found)
    # Three references: the frame's, `variables`, and getrefcount's argument.
    ours = 3
    if getattr(sys, "getrefcount", id)(variables) == ours:
        variables.clear()
    return found


def _write_back(frame, variables, changes):
    """Set variables of a frame by its f_locals, which is a copy, before 3.13.

    CPython puts all that is in the copy back into the frame. So it is emptied first, or the frame
    would get back values that it has changed meanwhile. The steps are in one call of C, so that no
    other thread runs between them and fills the copy again by locals().
    """
    import ctypes
    list(map(operator.methodcaller("__call__"), [
        variables.clear, functools.partial(variables.update, changes),
        functools.partial(ctypes.pythonapi.PyFrame_LocalsToFast, ctypes.py_object(frame),
                          ctypes.c_int(0))]))


def _stacks():
    """Yield (title, frames, the outermost first) of each other thread, then of each task.

    Threads of ours count only where the program's code runs in them. Loops are known by their
    run_forever() on a thread's stack; the session names its own.
    """
    known = {thread.ident: thread for thread in threading.enumerate()}
    running = sys._current_frames()
    del running[threading.get_ident()]
    session = current_session()
    loops = [] if session is None else session.loops()
    for ident in [each for each in known if each in running] + list(set(running) - set(known)):
        stack, thread = _outwards(running.pop(ident)), known.get(ident)
        loops += [_variables(each)["self"] for each in stack if each.f_code.co_name == "run_forever"
                  and "asyncio" in each.f_code.co_filename]
        if not _is_ours(thread) or any(_is_program_code(each.f_code) for each in stack):
            yield _thread_title(thread, ident), stack
    tasks = set()
    for loop in loops:
        asyncio = sys.modules["asyncio"]
        tasks |= (asyncio if hasattr(asyncio, "all_tasks") else asyncio.Task).all_tasks(loop)  # 3.6
    for task in sorted(tasks, key=_task_title):
        yield _task_title(task), _await_chain(getattr(task, "get_coro", lambda: task._coro)())


def _is_ours(thread):
    """Return whether a thread is one of hotrepl's, and not a job of the user's."""
    return thread is not None and thread.name.startswith("hotrepl ") and not (
        isinstance(thread, Job) and thread.number)


def _print_stack(title, stack, with_variables):
    """Print one stack as a traceback does, without what runs each thread and each input."""
    from code import InteractiveConsole
    import traceback
    stack = [frame for frame in stack if frame.f_code.co_filename not in (
        _THIS_FILE, InteractiveConsole.push.__code__.co_filename)
        and not frame.f_code.co_name.startswith("_bootstrap")]
    summary = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in stack)
    for each, frame in zip(summary, stack if with_variables else ()):
        if _is_program_code(frame.f_code):
            each.locals = _shown(_variables(frame))
    print(title + ":")
    print("".join(summary.format()))


def _shown(variables):
    """Return {name: shortened repr} of variables, but for `__special__` names and our tools."""
    return {name: _brief(value) for name, value in variables.items()
            if not re.match(r"__\w+__$", name) and TOOLS.get(name) is not value}


def _brief(value, width=60):
    """Return repr(value) as one line of at most `width` characters, also where it raises."""
    import reprlib
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = width
    try:
        return shorten(re.sub(r"\s*\n\s*", " ", shown.repr(value)), width)
    except Exception as exc:
        return "<%s, its repr raises %s>" % (type(value).__name__, type(exc).__name__)


def _thread_title(thread, ident):
    if thread is None:
        return "unknown to threading, ident %d" % ident
    kind = ", daemon" if thread.daemon else ""
    return "thread %s%s, ident %d" % (thread.name, kind, ident)


def _task_title(task):
    return "task " + (task.get_name() if hasattr(task, "get_name") else hex(id(task)))


def _await_chain(coroutine):
    """Return the frames of a task: its coroutine's, that of what it awaits, and so on."""
    stack = []
    while coroutine is not None:
        kind = next((each for each in ("cr", "gi", "ag")
                     if hasattr(coroutine, each + "_frame")), "")
        frame = getattr(coroutine, kind + "_frame", None)
        if frame is not None:
            stack.append(frame)
        if type(coroutine).__name__.startswith("async_generator_"):
            # One step of such a generator, as `async for` makes.
            coroutine = next((each for each in gc.get_referents(coroutine)
                              if isinstance(each, types.AsyncGeneratorType)), None)
        else:
            coroutine = getattr(coroutine, {"gi": "gi_yieldfrom"}.get(kind, kind + "_await"), None)
    return stack


# --- Watched calls ---
# The function gets code that calls a copy of it, and notes the call in a queue. Three threads:
#     the program's     make the call, note it, and do nothing else of ours
#     the looker        takes the calls from the queue, asks `when`, makes reprs; either may
#                       hang. It is the session's thread, or with quiet=True one of its own.
#     the keeper        gives the function its own code back once the watch is over, whatever hangs
# What ends a watch calls `stop`, or sets `_is_over`, which the keeper sees and the looker too.

WATCH_BACKLOG = 5000              # calls that wait to be looked at; of more, the first are kept
WATCH_LINES_PER_S = 100
WATCH_LOOK_S = 0.05               # how often looker and keeper look
WATCHED = {}                     # function -> the Calls of it; guarded by nothing but the GIL


class Call:
    """One call of a watched function; a context manager around it, in the thread that calls."""

    def __init__(self, calls, args, kwargs):
        self.args = args
        self.kwargs = kwargs
        self.result = None        # what it returned
        self.exception = None     # that it raised
        self.seconds = None       # how long it took
        self.number = 0           # among all that were noted
        self.thread = ""          # its name
        self._calls = calls
        self._begun = time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, kind, exception, stack):
        self.seconds = time.perf_counter() - self._begun
        self.exception = exception
        # Not current_thread(), which would make an object that stays.
        ident = threading.get_ident()
        self.thread = getattr(threading._active.get(ident), "name", "ident %d" % ident)
        self._calls.note(self)

    def again(self):
        """Call the function as it is now with the same arguments."""
        return self._calls.function(*self.args, **self.kwargs)

    def __repr__(self):
        words = [_brief(each, 40) for each in self.args]
        words += ["%s=%s" % (name, _brief(each, 40)) for name, each in self.kwargs.items()]
        outcome = ("-> " + _brief(self.result) if self.exception is None
                   else "raises " + _brief(self.exception))
        return "#%d %s(%s) %s  [%.3f ms, %s]" % (
            self.number, self._calls.function.__qualname__, shorten(", ".join(words), 160),
            outcome, self.seconds * 1000, self.thread)


class Calls(list):
    """The calls of a function that were watched; it fills until it is over."""

    def __init__(self, function, count, when, seconds):
        super().__init__()
        self.function = None
        with suppress(TypeError):
            self.function = patch_target(function)
        if not isinstance(self.function, types.FunctionType):
            raise TypeError("expected a Python function or method, found %s; of a class watch "
                            "one of its methods" % shorten(repr(function)))
        self._wanted = itertools.islice(filter(when, self._noted()), count)   # for who looks
        self._end = time.monotonic() + seconds        # when the watch is over at the latest
        self._session = current_session()         # at whose end it is over too
        self._numbers = itertools.count(1)        # of calls that were noted
        self._queue = collections.deque()         # calls that nobody has looked at
        self._is_over = threading.Event()         # set by whoever ends it
        self._looker = None       # with quiet=True the Job that looks at them
        # The looker has ended: an event, as PyPy 7.3 fails where two threads join one.
        self._is_looked_through = threading.Event()
        self.problem = ""         # ": " and why it is over, if that must be said
        # The function as it was, and the code that it has meanwhile.
        self._copy = _function_like(self.function, self.function.__code__,
                                    self.function.__closure__ or ())
        self._code = _forwarder(self.function, _noting(self._copy, self))[0]

    def start(self, looker=None):
        """Begin to watch; the calls are looked at in the Job `looker`, or by who calls look()."""
        if WATCHED.setdefault(self.function, self) is not self:
            raise RuntimeError("%s is watched already" % self.function.__qualname__)
        self._looker = looker
        with HOT.lock:
            # For its signature.
            vars(self.function).setdefault("__wrapped__", self._copy)
            _assign_code(self.function, self._code)
        for thread in filter(None, (looker, Job(self._keep))):
            thread.name = "hotrepl watch of " + self.function.__qualname__
            thread.start()

    def _keep(self):
        """The keeper: wait for the end of the watch, whoever brings it about, and stop."""
        while not (self._is_over.wait(WATCH_LOOK_S) or time.monotonic() > self._end
                   or self._session is not None and self._session.connection.is_left()):
            with HOT.lock:
                if self.function.__code__ is not self._code:
                    # No call is seen any more.
                    self.problem = ": the function was changed meanwhile"
                    break
        self.stop()

    def stop(self):
        """End the watch: the function is as it was, and this list has all that was noted.

        Where `when` or a repr hangs, the looker is interrupted after a while, and some are missing.
        """
        self._is_over.set()
        with HOT.lock:
            self._take_off()
            if WATCHED.get(self.function) is self:
                del WATCHED[self.function]
        if self._looker not in (None, threading.current_thread()) and (
                not self._is_looked_through.wait(2 * WATCH_LOOK_S)):
            with suppress(ValueError):
                # It has ended just now.
                async_raise(self._looker, SystemExit)

    def _take_off(self):
        """Give the function what the copy has, if no patch has given it anything else meanwhile."""
        if self.function.__code__ is self._code:
            _swap(self.function, self._copy.__code__, self._copy.__defaults__,
                  self._copy.__kwdefaults__)
        if vars(self.function).get("__wrapped__") is self._copy:
            # With a default: another thread may be here too.
            vars(self.function).pop("__wrapped__", None)

    def note(self, call):
        """Keep a call to be looked at; in the thread that made it, at whatever moment."""
        if self._is_over.is_set() or time.monotonic() > self._end:
            # A later patch was undone after us, or this is a forked child.
            self._take_off()
        else:
            call.number = next(self._numbers)
            if len(self._queue) < WATCH_BACKLOG:
                self._queue.append(call)

    def look(self, take, rest_s=0.0):
        """The looker: call take(call) for each call that is wanted, until the watch is over.

        After WATCH_LINES_PER_S of them it rests for `rest_s`.
        """
        try:
            for number, call in enumerate(self._wanted, 1):
                take(call)
                if number % WATCH_LINES_PER_S == 0:
                    self._is_over.wait(rest_s)
        except Exception as exc:
            self.problem = ": `when` raised " + _brief(exc)
            raise
        finally:
            self._is_over.set()
            self._is_looked_through.set()

    def _noted(self):
        """Yield the calls that were noted, as they come, until the watch is over."""
        is_over = False
        while not is_over:
            is_over = self._is_over.wait(WATCH_LOOK_S)
            yield from take_all(self._queue)

    def __repr__(self):
        state = "is over" if self._is_over.is_set() else "goes on"
        return "\n".join(list(map(repr, self)) + ["<watch of %s, %d calls, %s%s>" % (
            self.function.__qualname__, len(self), state, self.problem)])


def _noting(function, calls):
    """Return a function of the same kind that calls `function`, and notes that in `calls`."""
    import inspect
    flags = function.__code__.co_flags
    if flags & inspect.CO_COROUTINE:
        async def noting(*args, **kwargs):
            with Call(calls, args, kwargs) as call:
                call.result = await function(*args, **kwargs)
            return call.result
    elif flags & inspect.CO_GENERATOR and not flags & inspect.CO_ITERABLE_COROUTINE:
        def noting(*args, **kwargs):
            with Call(calls, args, kwargs) as call:
                call.result = yield from function(*args, **kwargs)
            return call.result
    else:
        def noting(*args, **kwargs):
            with Call(calls, args, kwargs) as call:
                call.result = function(*args, **kwargs)
            return call.result
    return noting


# --- Code that an editor sends ---
# It comes with its file and line, at which it is compiled: tracebacks and inspect.getsource() are
# right. It runs in the module of that file, one statement after the other; what stands in a class
# runs as the body of that class.
#     def step(x): ...     there is a step      patch(step, the new one), without the decorators:
#                                               they have run
#     class Till: ...      there is a Till      patch(Till, the new one), with the decorators
#     RATE = 5, and what is new                 bound in the module, or set on the class

class Placed:
    """Code that an editor sends: what it is, where it stands, and how it runs."""

    # A session evaluates this to call `run`. As code of this file it shows in no traceback.
    RUN = compile("run()", _THIS_FILE, "eval")

    def __init__(self, source, module=None, file=None, line=1, within=""):
        self._module = _module_of(module, file)
        self._filename = file or vars(self._module).get("__file__") or "<%s>" % module
        self._source = source.rstrip() + "\n"
        self._line = line         # where the source begins
        self._path = within.split(".") if within else []    # of the class around it
        self._scope = functools.reduce(_own_class, self._path, self._module)  # where names go
        self._params = _type_params(vars(self._module), self._path)   # PEP 695

    def run(self):
        """Run it in its module; return the value of the last statement, if it is an expression."""
        import ast
        tree = self._compile(self._whole_source(), more_flags=ast.PyCF_ONLY_AST)
        # Nothing runs where the compiler finds an error that the parser did not.
        self._compile(tree)
        holder, value = tree.body[0] if self._path else tree, None
        for node in holder.body:
            holder.body, value = [node], None
            if isinstance(node, ast.Expr):
                code = self._compile(ast.Expression(node.value), "eval")
                space = vars(self._module)
                value = eval(code, space, _ClassSpace(self._scope) if self._path else space)
            else:
                self._run_statement(tree, node, ast)
        return value

    def _compile(self, source, mode="exec", more_flags=0):
        """Compile with the file's name, and with the module's `from __future__` imports."""
        import __future__
        flags = {each.compiler_flag for each in vars(self._module).values()
                 if type(each) is __future__._Feature}
        return compile(source, self._filename, mode, sum(flags) | more_flags, True)

    def _whole_source(self):
        """Return the source at its lines; the line above it is the head of what it stands in."""
        params = "[%s]" % ", ".join(self._params) if self._params else ""
        head = "".join("class %s%s:\n" % (name, params) for name in self._path[-1:])
        if self._source[:1] in " \t" and not head:
            if re.match(r"\s*(@|(async\s+)?def\b|class\b)", self._source):
                raise ValueError("an indented definition needs the name of the class around it")
            head = "if True:\n"
        return "\n" * (self._line - 1 - head.count("\n")) + head + self._source

    def _run_statement(self, tree, node, ast):
        """Run `tree`, which has but one statement; a definition of what there is becomes a patch.

        In a function's place all its decorators become one that changes nothing: they have run.
        """
        space, found, title = vars(self._module), {}, self._module.__name__ + "."
        is_definition = hasattr(node, "decorator_list")
        name = _mangled(node.name, "".join(self._path[-1:])) if is_definition else None
        old = _old_of(vars(self._scope).get(name), node)
        if isinstance(old, types.FunctionType) and node.decorator_list:
            nothing = ast.parse("lambda function: function", mode="eval").body
            node.decorator_list = [ast.copy_location(nothing, node.decorator_list[0])]
        code = self._compile(tree)
        if self._path:
            code = _class_code(code, self._path[-1])
            found = _run_body(code, space, self._scope, self._params)
        else:
            exec(code, space, space if old is None else found)
        if old is not None:
            patch(old, found.pop(name))
            print("patched " + title + old.__qualname__)
        for name in found:
            if name not in _ANNOTATIONS:
                setattr(self._scope, name, found[name])
                print("set %s%s.%s" % (title, self._scope.__qualname__, name))


def _module_of(name, path):
    """Return the loaded module of that name, or where there is no name, of that file; LookupError.
    """
    # Links are followed last: beside a busy thread that takes long.
    for resolve in os.path.abspath, os.path.realpath:
        for each, module in list(sys.modules.items()):
            own = None if name else _source_path(module)
            if each == name or own is not None and resolve(own) == resolve(path):
                return module
    raise LookupError("no module that is loaded here is %s" % shorten(repr(name or path), 200))


def _own_class(scope, name):
    """Return the class that a module or a class has under `name`; LookupError."""
    found = vars(scope).get(name)
    if not isinstance(found, type):
        raise LookupError("no class %r in %r" % (name, scope))
    return found


def _old_of(live, node):
    """Return the class or function that `node` defines anew: `live`, or in what wraps it; or None.
    """
    if type(node).__name__ == "ClassDef":
        return live if isinstance(live, type) else None
    if isinstance(live, property):
        # Its decorator tells which of its functions it is.
        words = [getattr(each, "attr", "") for each in node.decorator_list]
        live = next((each for word, each in (("setter", live.fset), ("deleter", live.fdel))
                     if word in words), live.fget)
    return next((each for each in _functions_in(live) if each.__code__.co_name == node.name),
                live if isinstance(live, types.FunctionType) else None)


TOOLS = {"doc": doc, "server_print": server_print, "bg": bg, "fg": fg, "jobs": jobs, "halt": halt,
         "main_thread": main_thread, "stacks": stacks, "frames": frames, "at": at, "watch": watch,
         "follow": follow,
         "help": SessionHelp(), "reload": reload, "patch": patch, "unpatch": unpatch,
         "changes": changes, "undo": undo}


class Guests:
    """Our names in the program's namespaces, counted by servers; each only where it was free."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts = {}         # id(namespace) -> how many servers use it; guarded by _lock ...
        self._names = {}          # ... and the `__name__` that it has of us, if it had none

    def enter(self, namespace):
        """Put the tools into the dict `namespace` where their names are free."""
        with self._lock:
            self._counts[id(namespace)] = self._counts.get(id(namespace), 0) + 1
            if "__name__" not in namespace:
                self._names[id(namespace)] = _name_namespace(namespace)
            for name, tool in TOOLS.items():
                namespace.setdefault(name, tool)

    def hidden(self, namespace):
        """Return the names of tools that are the program's own here."""
        return sorted(name for name, tool in TOOLS.items() if namespace.get(name) is not tool)

    def leave(self, namespace, is_copy=False):
        """Take the tools out where they are still ours, by the last call: as many as of `enter`.

        `is_copy`: in a forked child, which may still pickle what the prompt made.
        """
        with self._lock:
            self._counts[id(namespace)] -= 1
            if self._counts[id(namespace)]:
                return
            del self._counts[id(namespace)]
            for name, tool in TOOLS.items():
                if namespace.get(name) is tool:
                    del namespace[name]
            own = self._names.pop(id(namespace), None)
            if own is not None and not is_copy:
                module = sys.modules.get(own)
                if type(module) is _NamespaceModule and vars(module) is namespace:
                    # Ours only: the program may have put another one there.
                    del sys.modules[own]
                if namespace.get("__name__") == own:
                    del namespace["__name__"]


class _NamespaceModule:
    """Stands in sys.modules for a namespace, which is its __dict__."""


def _name_namespace(namespace):
    """Give a namespace a name that no module has, and a module of that name; return the name.

    Else what is made at the prompt would belong to builtins: dataclasses, pickle and
    typing.get_type_hints look up a class's module.
    """
    names = itertools.chain(["__console__"], map("__console%d__".__mod__, itertools.count(2)))
    name = namespace["__name__"] = next(each for each in names if each not in sys.modules)
    sys.modules[name] = module = _NamespaceModule()
    module.__dict__ = namespace
    return name


GUESTS = Guests()


# === 10. Access ==============================================================
# Who may come in. The server shows each connection to its Door before a byte is read or sent:
#
#     who is at the other end                      may come in
#     our user, one of allow_uids                  at once
#     root, by a unix socket                       at once; by TCP: as who can't be known
#     another user of this machine, nobody         never
#     can't be known (another machine or system)   with the token, or a client certificate
#
# On one machine the kernel says whose socket is at the other end, so the owner needs no password
# and nobody else can have one. FirstBytes turns away what passes the door with the owner's uid:
# the requests of web pages in the owner's browser. Every doubt is a refusal. The client asks the
# same questions about its server. Nothing here keeps a thread or a descriptor; any thread may call
# it, also after a fork. The server lends its netlink socket: beside a thread that computes, to
# make and close one takes 10 ms. Uses 2 and 3. Its rooms:
#
#     Door, First bytes      is this connection let in?               the server's threads
#     Peers, Owners          who is at the other end of a socket      both sides
#     Private files          sockets, tokens and notes for our eyes   both sides
#     TLS                    carries bytes                            a thread for each connection
#     Servers                the client's way to a server             the client's main thread
#
# A refusal is the exception Refused. The server's Admission (section 13) catches it, has it put on
# record by Door.refuse, and closes the connection.
# Layouts: linux/netlink.h, linux/inet_diag.h, proc(5), unix(7), sys/ucred.h.

ADMISSION_TIMEOUT_S = 10.0        # for a TLS handshake, and for all attempts at the token together
ADMISSION_LIMIT = 16              # connections that may be proving themselves at once
TOKEN_ATTEMPTS = 3                # on one connection
FREE_GUESSES = 3                  # of a token or secret, by one peer; each further one waits longer
GUESS_DELAY_S = 2.0               # ... up to this
REFUSALS_PER_S = 1                # lines in the audit for one peer ...
REFUSED_PEERS = 10                # ... and of so many peers in that time
PEERS_REMEMBERED = 1000           # that guessed wrong
TOKEN_LIMIT_BYTES = 1024          # what is read of a peer before its token has passed
HEADER_LIMIT_BYTES = 65536        # how far lines of HTTP are looked for behind the first

audit_log = Logger("hotrepl.audit")


class Refused(Exception):
    """A connection may not come in. The text is for our log; the peer is told nothing."""

    def __init__(self, reason, peer):
        super().__init__(reason)
        self.peer = peer          # a Peer


class Door:
    """Who may connect to one server. Only `check_bind` changes that, before the first connection.

    Called for a connection in this order: check_peer, shake_hands where there is TLS, ask_token
    where the peer needs one. Each raises Refused, or says that the peer may go on.
    """

    def __init__(self, allow_uids=(), token=None, insecure=False, ssl_context=None,
                 allow_names=None):
        self.allow_uids = frozenset(allow_uids or ())     # besides our effective uid and 0
        # In certificates; None: any.
        self.allow_names = None if allow_names is None else frozenset(allow_names)
        self.token = _checked_token(token)    # bytes; None while nobody needs one
        self.insecure = insecure              # everybody comes in
        self.ssl_context = ssl_context        # None: plain text
        # TLS lets only holders of a client certificate through.
        self.wants_certificate = (ssl_context is not None
                                  and ssl_context.verify_mode.name == "CERT_REQUIRED")
        self.tell = None                      # called with a line for people about who is refused
        self._guesses = {}        # Peer.who -> wrong guesses; any thread, a lost count does no harm
        # Guarded by _lock: whose refusals were logged in this second, since when that lasts, and
        # how many others were left out since the last line.
        self._refused, self._refused_since, self._left_out = set(), -1e9, 0
        self._lock = threading.Lock()
        if isinstance(allow_names, str) or (
                allow_names is not None and not self.wants_certificate):
            raise ValueError("allow_names takes a list of names, and an ssl_context with "
                             "verify_mode CERT_REQUIRED")
        if not all(type(uid) is int for uid in self.allow_uids):
            raise TypeError("allow_uids takes integers, not %s; pwd.getpwnam(name).pw_uid is one"
                            % shorten(allow_uids))

    def check_bind(self, *places):
        """Raise ValueError if listening there, at numeric addresses or paths, lets strangers in.

        Makes a token where this system can't tell who connects and nothing else guards the door.
        """
        hosts = [each for each in places if "/" not in each]
        exposed = [each for each in hosts if not _is_loopback(each)]
        is_guarded = self.token is not None or self.wants_certificate
        if self.insecure:
            log.warning("insecure=True: whoever can connect to %s runs code in this process",
                        " or ".join(places))
        elif exposed and not is_guarded:
            raise ValueError(
                "other machines can reach %s; pass token=True, or an ssl_context with verify_mode "
                "CERT_REQUIRED, or insecure=True to let everybody in; or bind to 127.0.0.1, come "
                "through ssh" % exposed[0])
        elif hosts and not is_guarded and not knows_local_peers():
            self.token = make_token()

    def token_for_file(self):
        """Return the token for a file beside the server, or None.

        PermissionError: this process is by seteuid() only who will own the file, so that user must
        not get in.
        """
        if self.token is not None and lasting_uids() != {effective_uid()}:
            raise PermissionError("the token's file would be that of uid %d, who this process is "
                                  "by seteuid() only; call start() before that" % effective_uid())
        return self.token

    def check_peer(self, sock, netlink=None):
        """Return the Peer at the other end of `sock`, or raise Refused, by the table above.

        Does not block. A Peer that `needs_token` is let in only after ask_token.
        """
        try:
            peer = identify(sock, netlink)
        except Refused as exc:
            peer = exc.peer
            if not self.insecure or peer.address == "unknown":
                raise
        if self.insecure or peer.uid in self.allow_uids | lasting_uids():
            # The audit and pairing use who it is.
            return peer
        if peer.uid not in (None, 0):
            raise Refused("%s may not connect; allow_uids would let it in" % peer, peer)
        lack = "%s needs a token; pass token=True to have one" % peer
        if peer.uid == 0 and peer.host:
            # Root made the socket, and may have given it away.
            peer.uid = None
            lack = ("%s has a socket that root made and needs a token; root can come as uid %d"
                    % (peer, effective_uid()))
        peer.needs_token = peer.uid is None and self.token is not None
        if peer.uid is None and not (peer.needs_token or self.wants_certificate):
            raise Refused(lack, peer)
        return peer

    def shake_hands(self, tls, peer, timeout_s=ADMISSION_TIMEOUT_S):
        """Do the TLS handshake on the server's side, or raise Refused; blocks up to `timeout_s`."""
        try:
            # ssl takes it as a deadline for the whole handshake.
            tls.settimeout(timeout_s)
            tls.do_handshake()
            tls.settimeout(None)
            shown = tls.getpeercert() or {}
        except (OSError, ValueError) as exc:
            raise Refused("TLS handshake failed: %s" % exc, peer) from exc
        pairs = [pair for part in shown.get("subject", ()) for pair in part]
        peer.certificate = ",".join("=".join(pair) for pair in pairs)
        names = {value for key, value in pairs if key == "commonName"}
        names.update(value for kind, value in shown.get("subjectAltName", ()))
        # With post_handshake_auth TLS asks for none.
        if self.wants_certificate and not shown:
            raise Refused("%s showed no certificate" % peer, peer)
        if self.allow_names is not None and not names & self.allow_names:
            raise Refused("no name in the certificate of %s is in allow_names" % peer, peer)
        if shown and CLIENT_PURPOSE not in _purposes(tls.getpeercert(True)):
            raise Refused("the certificate of %s is not for clients (clientAuth)" % peer, peer)

    def ask_token(self, sock, peer, is_control, proofs=tuple, timeout_s=ADMISSION_TIMEOUT_S):
        """Ask for the token; return the bytes that came after the right one. Blocks.

        The REPL channel asks in words, and each line is an attempt, so that netcat will do; on the
        control channel the first request must be Authenticate. What proofs() returns when one is
        shown passes for the token.
        Refused: three wrong ones, a foreign greeting, 1 KB or `timeout_s` in all.
        """
        take, first_bytes = (_take_message if is_control else _take_line), FirstBytes(is_control)
        deadline, room, data = time.monotonic() + timeout_s, TOKEN_LIMIT_BYTES, b""
        try:
            for _ in range(TOKEN_ATTEMPTS):
                sock.sendall(b"" if is_control else TOKEN_PROMPT)
                candidate, data = take(data)
                while candidate is None:
                    # The deadline again each time: a byte now and then buys nothing.
                    sock.settimeout(max(deadline - time.monotonic(), 0.001))
                    received = sock.recv(room) if room else b""
                    room -= len(received)
                    refusal = (first_bytes.feed(received) if received else
                               "%d bytes instead of a token" % (TOKEN_LIMIT_BYTES - room))
                    if refusal:
                        raise Refused(refusal, peer)
                    candidate, data = take(data + received)
                is_right = self.check_guess(peer, "wrong token", self.check_token, candidate,
                                            proofs())
                if is_control:
                    sock.sendall(encode_message({"status": "ok"} if is_right else {
                        "status": "failed",
                        "reason": "expected Authenticate with the right token first"}))
                if is_right:
                    sock.settimeout(None)
                    return data
        except (OSError, ProtocolError) as exc:
            raise Refused("no token: %s" % exc, peer) from exc
        raise Refused("%d wrong tokens" % TOKEN_ATTEMPTS, peer)

    def check_guess(self, peer, reason, check, *args):
        """Return check(*args), whether a token or secret is right; late after several wrong ones.

        The wait, of `peer` on all its connections, comes before the answer: more connections at
        once are no quicker. `reason` is what is put on record where it is wrong.
        """
        wrong = self._guesses.get(peer.who, 0)
        if wrong >= FREE_GUESSES:
            peer.over.wait(min(GUESS_DELAY_S, 0.125 * 2 ** (wrong - FREE_GUESSES)))
        is_right = check(*args)
        if is_right:
            self._guesses.pop(peer.who, None)
        else:
            if len(self._guesses) >= PEERS_REMEMBERED:
                self._guesses.clear()
            self._guesses[peer.who] = self._guesses.get(peer.who, 0) + 1
            self.refuse(peer, reason)
        return is_right

    def check_token(self, candidate, proofs):
        """Return whether `candidate`, from the wire, is the token or a proof, in constant time."""
        if isinstance(candidate, str):
            candidate = candidate.encode("utf-8", "replace")
        return isinstance(candidate, bytes) and any(
            [compare_digest(candidate, each) for each in (self.token, *proofs)])

    def refuse(self, peer, reason, **facts):
        """Put a refusal on record: one of each peer and REFUSED_PEERS in all within a second.

        Its `left_out` says how many others, of whomever, there were since the last line.
        """
        with self._lock:
            if time.monotonic() - self._refused_since >= 1 / REFUSALS_PER_S:
                self._refused, self._refused_since = set(), time.monotonic()
            if peer.who in self._refused or len(self._refused) >= REFUSED_PEERS:
                self._left_out += 1
                return
            self._refused.add(peer.who)
            left_out, self._left_out = self._left_out, 0
        facts.update({"left_out": left_out} if left_out else {})
        self.audit("refused", peer=peer, reason=reason, **facts)

    def write_left_out(self):
        """Put on record how many refusals were left out since the last line; when a server stops.
        """
        if self._left_out:
            self.audit("refused", left_out=self._left_out)

    def audit(self, event, **facts):
        """Log one line about `event`; what peers wrote is escaped, and the token is never in it."""
        # logging.WARNING and logging.INFO.
        level = 30 if event == "refused" else 20
        if event == "refused" and self.tell is not None:
            self.tell("refused %s" % " ".join("%s=%s" % fact for fact in facts.items()))
        if audit_log.isEnabledFor(level):
            text = " ".join("%s=%r" % fact for fact in facts.items())
            if self.token is not None:
                text = text.replace(self.token.decode(), "[token]")
            audit_log.log(level, "%s %s", event, text)


# Object identifiers as they stand in a certificate: clientAuth, 1.3.6.1.5.5.7.3.2, and extKeyUsage.
CLIENT_PURPOSE, EXTENDED_KEY_USAGE = bytes.fromhex("2b06010505070302"), bytes.fromhex("551d25")


def _purposes(certificate):
    """Return what a certificate in DER may be used for, object identifiers (RFC 5280, 4.2.1.12)."""
    (_, whole), = _der(certificate)
    (_, signed), *_ = _der(whole)
    # 0xA3 is the tag of the extensions.
    for _, wrapped in [part for part in _der(signed) if part[0] == 0xA3]:
        (_, extensions), = _der(wrapped)
        for _, extension in _der(extensions):
            (_, name), *_, (_, value) = _der(extension)
            if name == EXTENDED_KEY_USAGE:
                (_, purposes), = _der(value)
                return [purpose for _, purpose in _der(purposes)]
    return []


def _der(data):
    """Yield (tag, content) of the elements in `data`, in DER (X.690, 8.1)."""
    while data:
        tag, size, at = data[0], data[1], 2
        if size & 0x80:
            # So many of the next bytes hold the size.
            at += size & 0x7F
            size = int.from_bytes(data[2:at], "big")
        yield tag, data[at:at + size]
        data = data[at + size:]


def _checked_token(token):
    """Return start()'s `token` as bytes: True makes one, None and False mean none."""
    if token is None or token is False:
        return None
    if token is True:
        return make_token()
    # In repr(), as the audit shows what was typed, these characters are themselves.
    if not isinstance(token, str) or not re.match(r"[!#-&(-[\]-~]{16,512}\Z", token):
        raise ValueError("token must be a str of 16 to 512 printable ASCII characters without a "
                         "space, quote or backslash; pass token=True to have one made")
    return token.encode("ascii")


def make_token():
    """Return a new secret of 256 random bits, as URL-safe ASCII bytes."""
    return os.urandom(32).hex().encode("ascii")


def _take_line(data):
    """Return (the first line, or None while it lacks its end; what comes after it)."""
    line, newline, rest = data.partition(b"\n")
    return (line.rstrip(b"\r"), rest) if newline else (None, data)


def _take_message(data):
    """Return (what the first message shows as the token, or None; what comes after it).

    None while its end is missing. A message that shows nothing, or is another, shows b"".
    """
    decoder = MessageDecoder()
    for at in range(1, len(data) + 1):
        for body in decoder.feed(data[at - 1:at]):
            is_attempt = isinstance(body, dict) and body.get("command") == "Authenticate"
            shown = is_attempt and (body.get("proof") or body.get("token"))
            return shown or b"", data[at:]
    return None, data


# --- Peers: who is at the other end ---
# identify() for the server, in its accepting thread; server_owner() for the client, before it
# sends anything. Both ask tcp_owner() below, or the unix socket itself.

NUMBERLESS = -1                   # a user who has no number in this user namespace: another one
_NOBODY = 65534                   # what a user namespace shows for all of these


class Peer:
    """Who is at the other end of a connection."""

    def __init__(self, address, uid=None, pid=None, inode=None):
        self.address = address    # "127.0.0.1:4711", "[::1]:4711" or "unix socket"
        self.host = address.rpartition(":")[0]    # the address without the port
        self.uid = uid            # None: can't be known
        self.pid = pid            # of the process that connected; None: can't be known
        self.inode = inode        # of its TCP socket; None: not known; 0: nobody has it
        self.certificate = ""     # whose TLS certificate was shown and verified
        self.needs_token = False  # the Door's decision
        self.over = threading.Event()     # its Admission was ended from outside: it waits no more

    @property
    def who(self):
        """What all connections of one user have in common: of this machine, or of another one.

        Nobody, whose connection was over at once, is one too, whatever the address. Whoever has one
        address of IPv6 has all that begin with the same 64 bits.
        """
        is_elsewhere = self.uid is None and self.inode != 0 and self.host
        return (_packed(self.host.strip("[]"))[:8] if is_elsewhere else b"", self.uid)

    def __str__(self):
        return "%s uid %s%s%s" % (
            self.address, {None: "unknown", NUMBERLESS: "without a number here"}.get(
                self.uid, self.uid), "" if self.pid is None else " pid %d" % self.pid,
            self.certificate and " certificate %r" % self.certificate)

    def __repr__(self):           # in the audit log
        return repr(str(self))


def identify(sock, netlink=None):
    """Return the Peer of a connected socket, or raise Refused where it is certainly nobody.

    Nobody is: a connection that is over; a socket whose process has closed it, which the kernel
    shows as uid 0, inode 0; a local address whose socket this network namespace doesn't have.
    `netlink` is what open_netlink() returns, where many are asked about.
    """
    address = "unknown"
    try:
        theirs = sock.getpeername()
        if not isinstance(theirs, tuple):
            return Peer("unix socket", *_unix_owner(sock))
        address = ("[%s]:%d" if ":" in theirs[0] else "%s:%d") % theirs[:2]
        uid, inode = tcp_owner(theirs, sock.getsockname(), netlink)
        # It fails after a reset: then the address may have been another's by now.
        sock.getpeername()
    except OSError as exc:
        if exc.errno in OUT_OF_DESCRIPTORS:
            raise
        raise Refused("%s was gone before it was identified" % address,
                      Peer(address, inode=0)) from exc
    if inode == 0 and (uid is not None or is_local(theirs)):
        raise Refused("%s belongs to no process that can be seen from here" % address,
                      Peer(address, inode=0))
    return Peer(address, uid, inode=inode or None)


def server_owner(sock, expected=None):
    """Return the uid of the server at the other end of a socket that we connected; None: unknown.

    It may not have accepted yet: then the listener counts, which has the connection in its queue.
    `expected` is who it was when asked before: a process of root's may accept as another for a
    while.
    """
    theirs, listener = sock.getpeername(), None
    # A look may take longer than that: there are always two.
    is_late, end = False, time.monotonic() + 0.5
    while True:
        try:
            peer = identify(sock)
            uid = holder_of(peer, expected)
            # What is accepted just now has an owner before a process has it.
            if uid is not None or not peer.inode or is_late:
                return uid
        except Refused:
            if listener is None:
                # The tables have what waits in a queue; what they have not was led off, by NAT.
                if tcp_owner(theirs, sock.getsockname()) == (None, 0):
                    return None
                listener = listener_at(theirs)
                # It may be accepted by now, and the listener gone.
                continue
            # Who called setuid() since accepts as another than who listens; root looks who it is.
            if is_late or listener.uid != 0 or effective_uid() == 0:
                return holder_of(listener)
        is_late = time.monotonic() > end
        time.sleep(0.01)


def listener_at(address):
    """Return as a Peer who listens at an address of this machine."""
    uid, inode = tcp_owner(address, ANYBODY)
    return Peer("%s:%d" % address[:2], uid, inode=inode)


def come_as_its_user(sock, address):
    """Make our new socket that of the user whose server is at `address`, where we are root.

    So the server lets us in: one that root made could have been given away to anybody.
    """
    if effective_uid() == 0 and hasattr(os, "fchown"):
        with suppress(OSError):
            # A container's root may not.
            uid = holder_of(listener_at(address)) if is_local(address) else None
            if uid:
                os.fchown(sock.fileno(), uid, -1)


def holder_of(peer, expected=None):
    """Return the uid of a Peer. Where we are root and root made its TCP socket, who holds it now.

    None: nobody who can be seen from here holds it. What another user made stays that user's,
    unless it is `expected` to be root's.
    """
    if 0 not in (peer.uid, expected) or not peer.inode or effective_uid() != 0:
        return peer.uid
    uids, pids, link = set(), [], "socket:[%d]" % peer.inode
    with suppress(OSError):
        pids = [name for name in os.listdir("/proc") if name.isdigit()]
    for pid in reversed(pids):
        with suppress(OSError):
            # This process has ended.
            with open("/proc/%s/status" % pid, "rb", 0) as status:
                found = [int(uid) for uid in status.read(4096).split(b"\nUid:\t")[1].split()[:4]]
            # To look through what it has open takes long: not for one more of root's.
            is_known = peer.uid == 0 and 0 in uids and set(found) == {0}
            if not is_known and _has_open("/proc/%s/task" % pid, link):
                # What a user starts is root's by its file only, and holds what it was given.
                is_roots = found[0] == 0 and (peer.uid == 0 or peer.uid in found)
                uids.add(0 if is_roots else peer.uid or found[0])
    return max(uids, default=None)


def _has_open(tasks, link):
    """Return whether a process has a file open; a thread may have descriptors of its own."""
    for task in os.listdir(tasks):
        with suppress(OSError):
            # This thread has ended.
            folder = os.open("%s/%s/fd" % (tasks, task), os.O_RDONLY)
            try:
                for name in os.listdir(folder):
                    with suppress(OSError):
                        # It was closed. By the folder's descriptor: a path takes twice as long.
                        if os.readlink(name, dir_fd=folder) == link:
                            return True
            finally:
                os.close(folder)
    return False


def knows_local_peers():
    """Find out by a socket of our own whether this system tells whose a socket is.

    It listens only: listeners are in the same tables, and a connection would take longer.
    """
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            return listener_at(listener.getsockname()).uid is not None
    except OSError:
        return False


def _unix_owner(sock):
    """Return (uid, pid) of who connected to a unix socket; None for what the system can't say."""
    if sys.platform.startswith("linux"):
        # PyPy 7.3 has no name for it.
        option = getattr(socket, "SO_PEERCRED", 17)
        pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, option, 12))
        return _certain(uid), pid
    try:
        # macOS, FreeBSD: LOCAL_PEERCRED, a struct xucred.
        return struct.unpack_from("2I", sock.getsockopt(0, 1, 76))[1], None
    except (OSError, struct.error):
        return None, None


def _certain(uid):
    """Return `uid`, or None for what a user namespace shows for all whom it has no number for."""
    if uid != _NOBODY:
        return uid
    try:
        with open("/proc/self/uid_map") as table:
            return uid if table.read().split() == ["0", "0", "4294967295"] else None
    except OSError:
        return None


def is_local(address):
    """Return whether a socket's address is one of this machine: packets to it would come from it.

    This machine's tables must know whose socket it is; of another machine they know nothing.
    """
    if _is_loopback(address[0]):
        return True
    try:
        # A UDP socket sends nothing for it. bind() would not do: it may take any address.
        with socket.socket(socket.AF_INET6 if len(address) == 4 else socket.AF_INET,
                           socket.SOCK_DGRAM) as probe:
            probe.connect((address[0], 9) + tuple(address[2:]))
            return _packed(probe.getsockname()[0]) == _packed(address[0])
    except OSError as exc:
        if exc.errno in OUT_OF_DESCRIPTORS:
            raise
        return False


def _is_loopback(host):
    """Return whether a numeric address leads to this machine alone: 127.x.x.x or ::1."""
    packed = _packed(host)
    return packed == b"\0" * 15 + b"\1" or len(packed) == 4 and packed[0] == 127


def _packed(host):
    """Return a numeric address as 4 or 16 bytes; IPv4 in IPv6 clothes as 4."""
    host = host.partition("%")[0]
    if ":" not in host:
        return socket.inet_pton(socket.AF_INET, host)
    packed = socket.inet_pton(socket.AF_INET6, host)
    return packed[12:] if packed.startswith(_MAPPED) else packed


_MAPPED = b"\0" * 10 + b"\xff\xff"        # in front of an IPv4 address in IPv6 clothes


# --- Owners: the kernel's tables of TCP sockets, asked by netlink or read as text ---
# On one machine both ends of a connection are in the tables, each with its uid; the pair of its
# addresses, the peer's first, finds the peer's end.
#     owner_by_netlink    a question to the kernel, 0.1 ms
#     owner_by_procfs     /proc/self/net/tcp{,6}, milliseconds; where netlink misses or can't be had
# An end that its process has closed is nobody's: inode 0, though its uid says root.
# TCP states of an end that its process holds: ESTABLISHED, FIN_WAIT1 and 2 (it has shut down its
# sending half), CLOSE_WAIT, CLOSING. SYN_SENT is not: that would be somebody's next connection.

_LISTENING = 10
_LIVE_STATES = (1, 4, 5, 8, 11, _LISTENING)
ANYBODY = "::", 0                 # what a listener is connected to, of IPv4 too
LOOPBACK = 1                      # the number of the device, always


def tcp_owner(theirs, ours, netlink=None):
    """Return (uid, inode) of the peer's end; (None, 0) for a miss, (None, None) if nobody can tell.

    Inode 0 is nobody. A miss counts only in a table that lists our own end: a kernel without
    tcp_diag and the empty /proc of a sandbox say "no such socket" to everything.
    """
    answer = None, None
    for look_up in functools.partial(owner_by_netlink, netlink=netlink), owner_by_procfs:
        try:
            owner = look_up(theirs, ours)
            if owner:
                uid = _certain(owner[0])
                has_number = effective_uid() != _NOBODY
                return NUMBERLESS if uid is None and has_number else uid, owner[1]
            if look_up(ours, theirs):
                answer = None, 0
                # Text takes long; it knows more of what is here, or where devices are not known.
                if hasattr(socket, "if_nameindex") and not is_local(theirs):
                    break
        except OSError as exc:
            # A sandbox, or not Linux.
            if exc.errno in OUT_OF_DESCRIPTORS:
                # This tells nothing about the peer.
                raise
    return answer


def owner_by_netlink(theirs, ours, netlink=None):
    """Ask the kernel for the socket that has the address `theirs` and is connected to `ours`.

    Return (uid, inode), inode 0 for nobody, or None for a miss; OSError if there is no answer. We
    ask as if a packet had come by one network device after the other. So we find a socket that is
    bound to a device, and the listener that would get the packet, whatever its family and address.
    """
    if netlink is None:
        with open_netlink() as netlink:
            return owner_by_netlink(theirs, ours, netlink)
    scope = (theirs + (0, 0))[3]
    found = _ask_netlink(netlink, theirs, ours, scope or LOOPBACK)
    if not scope and found is None:
        # PyPy 7.3 has no such function.
        for device, _ in getattr(socket, "if_nameindex", list)():
            found = found or _ask_netlink(netlink, theirs, ours, device)
    return found


def _ask_netlink(netlink, theirs, ours, device):
    """Ask as owner_by_netlink does, for one network device, given by its number."""
    ends, number = (_packed(theirs[0]), _packed(ours[0])), next(_queries) & 0xFFFFFFFF
    netlink.sendto(struct.pack(
        "=IHHII4BI4s16s16sIII",
        72, 20, 1, number, 0,     # nlmsghdr: SOCK_DIAG_BY_FAMILY
        socket.AF_INET if len(ends[0]) == 4 else socket.AF_INET6, socket.IPPROTO_TCP, 0, 0,
        0xFFFFFFFF, struct.pack("!HH", theirs[1], ours[1]), *ends,      # inet_diag_req_v2
        device, 0xFFFFFFFF, 0xFFFFFFFF), (0, 0))
    answered, sender = None, None
    # The others answer queries that somebody gave up.
    while answered != number or sender != 0:
        answer, (sender, _) = netlink.recvfrom(512)
        kind, answered, error = struct.unpack_from("=4xH2xI4xi", answer.ljust(20, b"\0"))
    if kind == 2 and error == -errno.ENOENT:      # NLMSG_ERROR
        return None
    if kind != 20:
        raise OSError("sock_diag answered with message %d, error %d" % (kind, error))
    state, uid, inode = struct.unpack_from("=xB62xII", answer, 16)        # inet_diag_msg
    # For want of the connection the kernel offers a listener on the peer's port: whoever comes
    # from port 22 of another machine would be root.
    if (state == _LISTENING) != (ours[1] == 0):
        return None
    return uid, inode if state in _LIVE_STATES else 0


_queries = itertools.count(1)     # their numbers


def owner_by_procfs(theirs, ours):
    """Do what owner_by_netlink does by reading the kernel's tables as text, in milliseconds."""
    names = _proc_names(theirs), _proc_names(ours)
    if not ours[1]:
        # Whoever listens there may do so at all addresses.
        for host in ["::", "0.0.0.0"] if len(_packed(theirs[0])) == 4 else ["::"]:
            names[0].extend(_proc_names((host, theirs[1])))
            names[1].extend(_proc_names((host, 0)))
    for table in "/proc/self/net/tcp", "/proc/self/net/tcp6":
        # Without IPv6 there is no tcp6.
        if os.path.exists(table) or not table.endswith("6"):
            with open(table) as rows:
                for row in rows:
                    _, source, target, state, _, _, _, uid, _, inode = row.split()[:10]
                    if source in names[0] and target in names[1]:
                        return int(uid), int(inode) if int(state, 16) in _LIVE_STATES else 0
    return None


def _proc_names(address):
    """Return how the tables may write an address: 32-bit words in the machine's byte order."""
    packed = _packed(address[0])
    forms = [packed, _MAPPED + packed] if len(packed) == 4 else [packed]
    return ["%s:%04X" % ("".join("%08X" % word for word in struct.unpack(
        "=%dI" % (len(form) // 4), form)), address[1]) for form in forms]


def open_netlink():
    """Return a socket to ask the kernel about sockets, for one thread, or raise OSError."""
    if not hasattr(socket, "AF_NETLINK"):
        raise OSError(errno.EAFNOSUPPORT, "no netlink on this system")
    netlink = OwnSocket(socket.AF_NETLINK, socket.SOCK_RAW, 4)  # NETLINK_SOCK_DIAG
    # The answer is there when sendto() returns.
    netlink.setblocking(False)
    return netlink


# --- First bytes: another protocol than ours, as a web page in the owner's browser sends ---
# A browser runs as its user, so the Door lets it in. What it sends is found out before a line runs:
#     GET /x HTTP/1.1\r\n      by the first line: a row of _GREETINGS
#     odd(\r\nHost: ...\r\n     by a header that every request of a browser has
#     \x16\x03...               a TLS hello; SSH, Redis and others likewise
#     x = 1\n                   ours; so is what begins with our client's secret

class FirstBytes:
    """Finds out from its first lines whether a connection speaks another protocol than ours.

    Feed it all that arrives, before any of it is used; at end-of-file feed it a newline. The first
    line that isn't blank decides. Up to the next blank one, at most HEADER_LIMIT_BYTES, no line may
    begin with "Host:": a browser's request has one such, whatever its first line looks like.
    On the control channel one byte decides: there is no skipping to the first message, since a web
    page can put one into a request's body.
    """

    def __init__(self, is_control=False):
        self.is_over = False      # all that need be looked at has come
        self._is_control = is_control
        self._room = HEADER_LIMIT_BYTES   # how many bytes more are looked at
        self._is_first = True     # the first line that isn't blank is not past
        self._text = b"\n"        # a newline, and the line that is being received

    def feed(self, received):
        """Return what the connection speaks, as a text for the log, or None."""
        if self.is_over:
            return None
        if self._is_control:
            self.is_over = True
            known = foreign_greeting(received) or "not a control message"
            return None if received[:1] == IAC else known
        text = self._text + received
        # As the session will read it: without telnet's commands, and blank lines before the first.
        # Quicker than `in`.
        if text.find(IAC) >= 0:
            text = re.sub(_TELNET, b"", text)
        is_ours, foreign = False, None
        if self._is_first:
            text = b"\n" + text[re.match(_BLANK, text).end():]
            # Our client's secret.
            is_ours = text.startswith(BEGIN, 1)
            foreign = None if is_ours else foreign_greeting(text[1:])
        end = _HEADER_END.search(text)
        if end and end.group("host") and not is_ours:
            foreign = foreign or "an HTTP request"
        self._room -= len(received)
        if is_ours or foreign or end or self._room < 0 and text != b"\n":
            self.is_over = True
        # What is past need not be looked at again, but for a first line that needs its second.
        begin = 0 if self._is_first and _UNDECIDED.match(text) else text.rfind(b"\n")
        self._is_first = self._is_first and begin == 0
        text = text[begin:]
        # A web page can make the URL in its request as long as it likes.
        self._text = text if len(text) <= 2048 else text[:1023] + b"~" + text[-1024:]
        return foreign


_HEADER_END = Lazy(lambda: re.compile(
    # A blank line, or a Host: before it. `host: str` in front of a bare LF is an annotation.
    rb"\n(?:\r?\n|(?P<host>(?i:host):(?:[^\n=#]*|[ \t]*(?:[^\s\"#]+[ \t]*)?)\r\n"
    rb"|H(?:ost|OST):[ \t]*(?:[^\s=#]+[ \t]*)?\n|(?i:cookie):[ \t]*[^\s=]+=[^\s=]))"))
_UNDECIDED = Lazy(lambda: re.compile(rb"\n(?:CONNECT|STOMP)\r?\n[\w-]*:?\Z"))
_TELNET = rb"(?s)\xff(?:[\xfb-\xfe].|[\xf0-\xf9\xec])"
_BLANK = rb"[ \t\n\v\f\r]*"

# Two words side by side are no Python, unless one is a keyword (`1and x` has one too).
_NO_KEYWORD = (r"(?!\d*(?:%s)\b)" % "|".join(keyword.kwlist)).encode("ascii")
_METHOD = rb"[^\s\"(),/:;<=>?@[\\\]{}]+"          # RFC 9110: a token; and odd bytes
_WORD = _NO_KEYWORD + rb"(?![-+~.]*\d)[^\s#'\"(),/:;<=>?@[\\\]{}]+"
_GAP = rb"[^\S\n]+"

# What no Python program starts with. A row decides at its last byte, so one that could also begin
# an expression (`USER in y`) reaches to where it can't. No row may backtrack for long: the bytes
# are a stranger's. What a web page, or whoever was talked into fetching a URL, can send is HTTP
# even where it is Python too: `GET / x` divides, so does `get /x`. With two line ends in its URL
# a header's end comes before the Host: there the request line has to be known by itself.
_GREETINGS = (
    ("a TLS hello", rb"\x16\x03"),
    ("an SSH banner", rb"SSH-\d\.\d+-"),
    ("an rsync or VNC banner", rb"@RSYNCD: |RFB \d{3}\.\d{3}"),
    ("a PROXY header", rb"PROXY (?:TCP[46] |UNKNOWN)"),
    ("an SMTP, FTP, POP3 or IRC command", rb"(?i:EHLO|HELO|LHLO|USER|PASS|NICK) +" + _NO_KEYWORD
     + rb"(?:\w|\[\d+\.\d+\.|\[IPv6:\S*:\S*:)[^\n]*\n"
     rb"|(?i:MAIL FROM:)|CAP (?:LS|REQ|LIST|END)\s"),
    ("an IMAP command", rb"\w*\d (?:CAPABILITY|LOGIN|AUTHENTICATE|STARTTLS|NOOP|ID)\s"),
    ("an XML stream", rb"<\?xml|<stream:stream"),
    ("a DICT command", rb"CLIENT libcurl \d"),
    ("a Redis command", rb"\*\d+\r\n"),
    # Numbers at the end say how much data follows: memcached, beanstalkd, NATS; also Graphite.
    ("a command with a length", _WORD + _GAP + _NO_KEYWORD + rb"[\w'\"$\x80-\xff]\S*(?: +\d+)+"
     rb"(?: noreply)?[ \t]*\r?\n"
     rb"|(?:(?:set|add|replace|append|prepend|cas) [^\s#'\"]+|put) \d+ \d+ \d"
     rb"|(?:set|add|replace|append|prepend|cas) \S+ \d+ \d+ \d+[^\n]*\r\n"),
    ("an LDAP or Bazaar request", rb"0[\x05-\x84][^\x02]{0,4}\x02\x01|bzr message \d"),
    ("a git request", rb"[0-9a-f]{4}git-(?:upload|receive)-(?:pack|archive)[ \0]"),
    ("a CVS request", rb"BEGIN [A-Z]+ REQUEST\s"),
    ("a STOMP frame", rb"(?:CONNECT|STOMP)\r?\n[\w-]+:[^ \n]"),
    ("a syslog message", rb"<\d{1,3}>"),
    ("a SOCKS request", rb"\x04[\x01\x02]|\x05[\x01-\x08][\x00-\x02]"),
    # AMQP, MQTT, PostgreSQL, RDP, STUN, ...
    ("a binary protocol", rb"[\x01\x02\x06-\x08\x0e-\x19]|[^\n\0]*\0"),
    # RFC 9112, whatever the bytes of the method and the target are
    ("an HTTP request", _METHOD + rb" (?:/\S*|\*|[A-Za-z][\w+.-]*:\S*|[^\s/?#]*:\d*)"
     rb" HTTP/\d\.\d\r\n"),
    # A word, a gap, a target: a path (but `x /= 2`), a query, a URL or a host with its port. RTSP,
    # SIP and ICAP look the same. With HTTP/0.9 the line is over after that.
    ("an HTTP request", _WORD + _GAP + rb"(?:/+(?:[^\s=/\\]|[^\S\n]*[\n\0])"
     rb"|[/*]" + _GAP + rb"(?:HTTP|RTSP|SIP|ICAP)/\d|\?[^\s?]|\w[\w+.-]*:\S)"),
    # Methods of which nobody has a number: IANA's, but for LABEL, UPDATE, ACL.
    ("an HTTP request", rb"(?:GET|HEAD|POST|PUT|DELETE|OPTIONS|PATCH|TRACE|QUERY|REPORT|SEARCH"
     rb"|PROP(?:FIND|PATCH)|MK[A-Z]{3,}|COPY|MOVE|MERGE|(?:UN)?(?:LOCK|LINK|BIND)|REBIND"
     rb"|(?:UN)?CHECKOUT|CHECKIN|VERSION-CONTROL)" + _GAP + rb"/"),
    ("an HTTP request",           # and one that is not valid
     rb"(?:[^\n#'\"]*(?:/|\b" + _NO_KEYWORD + rb"\w+)|" + _WORD + _GAP + _NO_KEYWORD
     + rb"[\w'\"$?`{~\\\x80-\xff](?:[^\n]*\S)?)" + _GAP + rb"HTTP/\d\.\d\r?\n"),
    # A header, of LSP or DAP too. A name without a hyphen could be annotated, as in `host: str`.
    ("a message with a header", _NO_KEYWORD + rb"[A-Za-z]\w*(?:-\w+)+:[ \t]*\S"),
)


def foreign_greeting(received):
    """Return the name of the protocol that bytes from a connection's start belong to, or None."""
    return next((name for name, pattern in _GREETINGS if re.match(pattern, received)), None)


# --- Private files: unix sockets, tokens, the runtime folder ---
# All have mode 0600, and are read only where they are regular files of ours.
#     PATH, PATH.control                  a server's unix sockets
#     PATH.token, token-PORT-NETWORK      its token, for our client
#     server-PID-RANDOM.note              where it is, for list, connect and exec
#     ~/.hotrepl_history                  what was typed, see section 14
# All but the last are gone when the server stops. Those without a PATH are in the runtime folder,
# of mode 0700: hotrepl in $XDG_RUNTIME_DIR, else hotrepl-UID where temporary files are. They are
# made and removed by the descriptor of their folder: its path could lead elsewhere a moment later.

@contextmanager
def unix_listener(path, token=None):
    """Yield a listener at `path` for our uid alone; the `token` is in a file beside it.

    Both files are gone afterwards. One that a killed server left is replaced; where somebody
    answers, that is an OSError, EADDRINUSE. There is no moment in which others could connect:
    before listen() nobody can, and by then the mode is 0600.
    """
    limit_bytes = 107 if sys.platform.startswith("linux") else 103
    if len(os.fsencode(path)) > limit_bytes or "\0" in path:
        raise ValueError("unix socket path %r must have no NUL and at most %d bytes, it has %d; "
                         "pass a shorter one" % (path, limit_bytes, len(os.fsencode(path))))
    with ExitStack() as undo:
        listener = entered(undo, OwnSocket(socket.AF_UNIX, socket.SOCK_STREAM))
        with suppress(OSError):
            # Linux: bind() gives the mode to the file.
            os.fchmod(listener.fileno(), 0o600)
        try:
            with safe_folder(path) as (folder, name):
                _remove_stale(folder, name, path)
                listener.bind(path)
                made = os.stat(name, dir_fd=folder, follow_symlinks=False)
                undo.callback(remove_made, path, made)
                if made.st_mode & 0o077:
                    # On other systems the file needs it.
                    os.chmod(path, 0o600, follow_symlinks=False)
                if token is not None:
                    # In the very folder of the socket, wherever the way leads by now.
                    undo.callback(remove_made, path + TOKEN_SUFFIX,
                                  _write_at(folder, name + TOKEN_SUFFIX, token))
        except OSError as exc:
            raise type(exc)(exc.errno, "a program listens at %s, or it is no socket; stop it, "
                            "remove it or pass another path" % path
                            if exc.errno == errno.EADDRINUSE else
                            "can't listen at %s: %s" % (path, exc.strerror)) from exc
        listener.listen(BACKLOG)
        listener.setblocking(False)
        yield listener


def _remove_stale(folder, name, path):
    """Make way for a socket: remove one that nobody answers; else OSError, EADDRINUSE."""
    with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # It may be alive and full.
        probe.settimeout(1.0)
        is_socket = stat.S_ISSOCK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        near = "/proc/self/fd/%d/%s" % (folder, name)
        if os.path.lexists(near) and len(os.fsencode(near)) <= 107:
            # Linux: by the descriptor the path can't lead elsewhere meanwhile.
            path = near
        if not is_socket or probe.connect_ex(path) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, "in use")
        os.unlink(name, dir_fd=folder)


@contextmanager
def safe_folder(path):
    """Yield (descriptor of the folder of the file `path`, the file's name), for `dir_fd`.

    By its descriptor the folder stays the same one; its path may lead elsewhere a moment later,
    where it goes through folders of other users. PermissionError: others can replace files in it.
    """
    if os.name != "posix":
        # The folder of the user's profile keeps others out.
        yield None, path
        return
    place, name = os.path.split(path)
    folder = os.open(place, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)
    try:
        info = os.fstat(folder)
        is_open = info.st_mode & 0o002 or info.st_mode & 0o020 and not _is_own_group(info.st_gid)
        if is_open and not info.st_mode & stat.S_ISVTX or info.st_uid not in (0, effective_uid()):
            raise PermissionError(
                errno.EPERM, "others may replace files in %s (mode %o, uid %d); pass a path in a "
                "folder that only we may write to" % (place, info.st_mode & 0o7777, info.st_uid))
        yield folder, name
    finally:
        os.close(folder)


def _is_own_group(gid):
    """Return whether our user is alone in a group, as pam_umask(8) knows it, and sets 002 then."""
    with suppress(ImportError, KeyError):
        import grp
        import pwd
        group, user = grp.getgrgid(gid), pwd.getpwuid(effective_uid())
        is_named_so = group.gr_name == user.pw_name and gid == user.pw_gid != 0
        return is_named_so and set(group.gr_mem) <= {user.pw_name}
    return False


def remove_made(path, made):
    """Remove the file `path` if it is still the one of which `made` is what os.stat said."""
    with suppress(OSError), safe_folder(path) as (folder, name):
        # It may be gone, and the folder with it.
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if os.path.samestat(info, made) and info.st_mtime_ns == made.st_mtime_ns:
            os.unlink(name, dir_fd=folder)


def token_path(address):
    """Return the path of the file that holds the token of the server at `address`, as in Server.

    By port and network: a container may share our folder, and its ports are not ours.
    """
    if isinstance(address, str):
        return address + TOKEN_SUFFIX
    return os.path.join(runtime_folder(), _token_name(address[1]))


def stored_tokens(address):
    """Yield the tokens that servers of ours have left in files for who connects to `address`."""
    for path in ([token_path(address)] if isinstance(address, str)
                 else runtime_files(_token_name(address[1]))):
        with suppress(OSError, ValueError):
            yield read_private(path).decode("ascii").strip()


def _token_name(port):
    """Return the name of the token file for a port; it has the number of the network namespace."""
    return "-".join(["token-%d" % port] + re.findall(r"net:\[(\d+)", namespaces()))


def runtime_folder():
    """Return the path of this user's own folder for small files, made if need be, mode 0700.

    PermissionError: it is a link, another user's or open to others, who may have left something.
    """
    path = _runtime_folders()[0]
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    _check_folder(path)
    return path


def runtime_files(pattern):
    """Return the paths of the files of this user's processes whose name is like `pattern`.

    Also of those with another environment than ours: a service has no XDG_RUNTIME_DIR.
    """
    import fnmatch
    found = []
    for folder in _runtime_folders():
        with suppress(OSError):
            # There is none, or it is another user's trap.
            _check_folder(folder)
            found += [os.path.join(folder, name)
                      for name in fnmatch.filter(os.listdir(folder), pattern)]
    return found


def _runtime_folders():
    """Return where this user's folder can be; the first is for what this process writes.

    A folder that somebody chose for XDG_RUNTIME_DIR, not systemd, is the only one.
    """
    uid, chosen = effective_uid(), os.environ.get("XDG_RUNTIME_DIR", "")
    # Not tempfile's choice: its import takes longer than all of start().
    places = [os.environ.get(name, "") for name in ("TMPDIR", "TEMP", "TMP")]
    temporary = os.path.join(next(filter(os.path.isdir, places), "/tmp"), "hotrepl-%d" % uid)
    usual = "/run/user/%d/hotrepl" % uid
    is_ours = os.path.isabs(chosen) and os.path.isdir(chosen) and os.stat(chosen).st_uid == uid
    if not is_ours:
        return [temporary, usual]
    own = os.path.join(chosen, "hotrepl")
    return [own, temporary] if own == usual else [own]


def _check_folder(path):
    """Raise PermissionError where a path is no folder that only we may open."""
    info = os.lstat(path)
    if not (stat.S_ISDIR(info.st_mode) and _is_private(info)):
        raise PermissionError(
            errno.EPERM, "%s is no folder that only we may open (mode %o, uid %d); remove it or "
            "set XDG_RUNTIME_DIR to a folder of your own" % (path, info.st_mode, info.st_uid))


def _is_private(info):
    """Return whether what `os.stat` says of a file or folder keeps all others out, but root."""
    # Elsewhere the folder of the user's profile keeps others out.
    return info.st_uid == effective_uid() and not (os.name == "posix" and info.st_mode & 0o077)


def effective_uid():
    """Return the effective uid of this process; 0 where the system has none: files have it then."""
    return getattr(os, "geteuid", int)()


def lasting_uids():
    """Return the uids that may come in as this process's own, a set of one, or an empty one.

    A program of root's that works as somebody by seteuid() must not let that user in: whoever is
    in can take root's power back. So it is root's as long as one of its uids is 0; where its uids
    differ otherwise, it is nobody's. Source: man 2 getresuid.
    """
    uids = set(os.getresuid()) if hasattr(os, "getresuid") else {effective_uid()}
    return {0} if 0 in uids else uids if len(uids) == 1 else set()


def open_own(path, flags=os.O_RDONLY):
    """Open a regular file of ours, or with O_CREAT make it; return the descriptor, or OSError.

    Whoever may write to its folder can put a link there to another file of ours, or a FIFO.
    """
    flags |= sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    descriptor = os.open(path, flags, 0o600)
    info = os.fstat(descriptor)
    if stat.S_ISREG(info.st_mode) and info.st_uid == effective_uid() and info.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    raise PermissionError(errno.EPERM, "%s is no file of ours alone" % path)


def read_private(path, limit_bytes=TOKEN_LIMIT_BYTES):
    """Return the bytes of a file; OSError unless it is a small one that only we may open."""
    with open(open_own(path), "rb") as file:
        info = os.fstat(file.fileno())
        if not _is_private(info) or info.st_size > limit_bytes:
            raise PermissionError(errno.EPERM, "%s is no small file that only we may open" % path)
        return file.read(limit_bytes)


def write_private(path, content):
    """Make or replace the file `path`, mode 0600, with `content`, bytes, whole or not at all.

    Return what `remove_made` takes.
    """
    with safe_folder(path) as (folder, name):
        return path, _write_at(folder, name, content)


def _write_at(folder, name, content):
    """Write a file under another name, and give it its own then; return what os.stat says of it."""
    new = "%s.%s" % (name, os.urandom(8).hex())
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(new, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(content)
        made = os.stat(new, dir_fd=folder)
        os.replace(new, name, src_dir_fd=folder, dst_dir_fd=folder)
        return made
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(new, dir_fd=folder)
        raise


def namespaces():
    """Return the names of our namespaces of processes and networks, "" where there are none.

    They tell containers apart that share a folder: a PID or port of the one means nothing in the
    other.
    """
    try:
        return " ".join(os.readlink("/proc/self/ns/" + kind) for kind in ("pid", "net"))
    except OSError:
        return ""


def noted_servers():
    """Return the notes of this user's running servers, the oldest first; see `_write_note`.

    The notes of those that are gone are removed; another container's are left alone.
    """
    notes = []
    for path in runtime_files("server-*.note"):
        with suppress(OSError, ValueError):
            # It stops just now, or it is no note of ours.
            note = _read_note(path)
            if note["namespaces"] != namespaces():
                continue
            if _is_alive(note):
                notes.append(note)
            else:
                os.unlink(path)
    return sorted(notes, key=lambda note: note["started"])


def _read_note(path):
    """Return a server's note as a dict; OSError, ValueError: it is none that a server wrote."""
    text = read_private(path, NOTE_LIMIT_BYTES).decode("utf-8", "surrogatepass")
    pid, process, started, spaces, address, control_address, *argv = text.split("\0")
    note = {"pid": int(pid), "process": process, "started": float(started),
            "namespaces": spaces, "argv": argv, "address": _parse_place(address),
            "control_address": _parse_place(control_address)}
    if not 0 < note["started"] <= time.time() + 1e9:
        raise ValueError("the time when it started is none")
    return note


def _parse_place(text):
    """Return the address of which `text` is what _join_address makes: a path or (host, port)."""
    host, _, port = text.rpartition(":")
    return text if text.startswith("/") else (host.strip("[]"), int(port))


def _is_alive(note):
    """Return whether the server of a note runs; without a connection, which it would count."""
    try:
        if os.name == "posix":
            os.kill(note["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It has become another user's.
        pass
    address = note["address"]
    if process_mark(note["pid"]) != note["process"]:
        return False
    if isinstance(address, str):
        return os.path.exists(address)
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as probe:
        if os.name == "posix":
            # Else an address counts too that was in use a minute ago.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as exc:
            return exc.errno == errno.EADDRINUSE
    return False


# --- TLS: one thread carries the bytes between it and a plain socket ---
# A TLS connection bears one thread at a time; what talks through the plain socket has several.
# Each direction is a generator that yields what it has to wait for, as wait_for() takes it, or None
# once it has moved something: then it is the other one's turn.

def carry(tls, inner):
    """Carry bytes between the TLS connection `tls` and the socket `inner` to the end; close both.

    Blocks, until nothing more comes out of `inner`; shutting down either socket ends it.
    """
    with tls, inner:
        tls.setblocking(False)
        inner.setblocking(False)
        inward = _way(tls, inner)
        for wait in _way(inner, tls):
            waits = [wait, next(inward, wait)]
            if None not in waits:
                wait_for(*map(operator.add, *waits))
        inner.close()
        drain(tls)


def _way(source, target):
    """Carry all that comes out of `source` to `target`, then its end."""
    import ssl
    data = None                   # received and not sent yet; b"" is the end
    with suppress(OSError):
        while data != b"":
            sock = target if data else source
            try:
                data = data[target.send(data):] or None if data else source.recv(RECEIVE_BYTES)
                yield None
            except ssl.SSLWantReadError:
                # TLS may want the other direction.
                yield [sock], []
            except ssl.SSLWantWriteError:
                yield [], [sock]
            except BlockingIOError:
                yield ([], [sock]) if data else ([sock], [])
    with suppress(OSError, ValueError):
        # The other end may have gone without waiting for our goodbye.
        if hasattr(target, "unwrap"):
            target.unwrap()
    shut_down(target, socket.SHUT_WR)


def drain(sock):
    """Wait a moment for a peer that was told goodbye: unread input would make that a reset."""
    with suppress(OSError):
        socket.socket.settimeout(sock, CLOSE_TIMEOUT_S)
        for _ in range(64):
            # What it is, be it of TLS, does not matter.
            if not socket.socket.recv(sock, RECEIVE_BYTES):
                break


def shut_down(sock, how=socket.SHUT_RDWR):
    """Shut down a socket, from any thread; one that is gone already is as good."""
    with suppress(OSError):
        if is_own(sock):
            # SSLSocket's own shutdown() would go on in plain text.
            socket.socket.shutdown(sock, how)


# --- Servers: the way to one, whose it is, and its token ---
# The client's side of the door, for the main thread; it blocks. `dial` makes a connection, and
# `tunnel` one through the system's ssh. Nothing is sent to a server of another user, or of an
# unknown one, unless TLS, ssh or the user's word vouches for it.

ANSWER_LIMIT_S = 10.0             # how long we wait for a server's greeting, and for any reply
FAR_LIMIT_BYTES = 1 << 24         # what is read of another machine about whose a server is


def time_left_s(deadline, limit_s=ANSWER_LIMIT_S):
    """Return how long to wait: until `deadline`, or `limit_s` where it is None; socket.timeout."""
    if deadline is None:
        return limit_s
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise socket.timeout("timed out")
    return left_s


@contextmanager
def tunnel(target, port, control_port, deadline, has_shell=True):
    """Have the system's ssh forward both channels to private unix sockets.

    Keys, known hosts, agents, jump hosts are ssh's own; what it asks is on the terminal. Yields the
    first one's path, and a function that looks whose server is over there.
    """
    import subprocess
    import tempfile
    # The folder's mode is 0700.
    with tempfile.TemporaryDirectory(prefix="hotrepl-") as folder:
        path = os.path.join(folder, "repl")
        words, far_path = ssh_words(target, path, port, control_port, has_shell)
        questions = os.path.join(folder, "questions")
        os.mkfifo(questions)
        # To open it for writing only would wait for a reader.
        asked = os.open(questions, os.O_RDWR)
        ssh = subprocess.Popen(["sh", "-c", _SSH, questions] + words, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
        try:
            # ssh makes the two sockets in this order, so this is the last.
            while not os.path.exists(path + CONTROL_SUFFIX):
                if ssh.poll() is not None:
                    raise ConnectionError(errno.ECONNREFUSED, "no way through ssh to %s: it ended "
                                          "with exit code %d" % (target, ssh.returncode))
                time_left_s(deadline)
                time.sleep(0.02)
            confirm = functools.partial(far_owner, asked, ssh.stdout, deadline, target, far_path,
                                        port, control_port)
            if has_shell and confirm(is_first=True) == NO_SHELL:
                with suppress(subprocess.TimeoutExpired):
                    ssh.wait(ANSWER_LIMIT_S)
                if ssh.poll() in (None, 255):
                    # Others there can see to it that no shell starts.
                    raise ConnectionError(errno.ECONNABORTED, "%s starts nothing that could say "
                                          "whose server is there, so nothing was sent" % target)
                with tunnel(target, port, control_port, deadline, has_shell=False) as found:
                    yield found
            else:
                yield path, confirm if has_shell else lambda: NO_SHELL
        finally:
            os.close(asked)
            ssh.stdin.close()
            ssh.wait()
            ssh.stdout.close()


def ssh_words(target, path, port, control_port, has_shell):
    """Return (the command that forwards both channels to sockets at `path`, the path over there).

    The latter is None where ports are meant.
    """
    import shlex
    match = re.match(r"(?:ssh://)?((?:[^@/]+@)?)(?:\[(.+)\]|([^:/@]+))(?::(\d+))?(/.+)?/?$", target)
    if not match:
        raise ValueError("%r is no ssh address, expected ssh://USER@HOST:PORT" % target)
    user, literal, name, ssh_port, far_path = match.groups()
    far_ends = ([far_path, far_path + CONTROL_SUFFIX] if far_path else
                ["127.0.0.1:%d" % each for each in (port, control_port)])
    words = ["ssh", "-T", "-o", "ExitOnForwardFailure=yes"]
    words += [] if has_shell else ["-N"]
    words += ["-p", ssh_port] if ssh_port else []
    for ends in zip([path, path + CONTROL_SUFFIX], far_ends):
        words += ["-L", "%s:%s" % ends]
    code = _SAY_OWNERS % ("stat -c%u " + " ".join(map(shlex.quote, far_ends)) if far_path else
                          _FIND_ROWS % (port, control_port))
    words += ["--", user + (literal or name)]
    words += ["exec sh -c " + shlex.quote(code)] if has_shell else []
    return words, far_path


# Runs ssh until it ends, or until stdin does, which a killed client closes as well. Ctrl+C and
# Ctrl+Z, which are for the server, reach all programs here. ssh can miss the first signal.
_SSH = """trap "" INT TSTP
exec 3<&0 </dev/null
"$@" <"$0" 3<&- & ssh=$!
{ read _ <&3; kill $ssh; sleep 1; kill -9 $ssh; } >/dev/null 2>&1 & watch=$!
wait $ssh 2>/dev/null; code=$?
kill $watch 2>/dev/null
exit $code"""

# What runs over there: it says for each line that it reads whose the servers are. Of the tables
# only the head and the rows of our ports but for TIME_WAIT, 06: anybody can make many others.
_FIND_ROWS = ("grep -h -e sl -e ':%04X [^ ]*:[^ ]* 0[^6]' -e ':%04X [^ ]*:[^ ]* 0[^6]' "
              "/proc/self/net/tcp /proc/self/net/tcp6")
# First it says that it is there, for which it needs no other process: others can see to it that
# there are no more. At once too: with StdinNull in ssh's configuration there is nothing to read.
_SAY_OWNERS = ("echo hotrepl starts; while read _; do "
               "echo; echo hotrepl shell; echo hotrepl `id -u`; [ -e /proc/self/net/tcp ] && "
               "echo hotrepl table; %s 2>/dev/null; echo hotrepl end; done")


NO_SHELL, NOT_SAID = "no shell", "not said"       # an account that may forward only; no /proc
# What ssh can get to by 127.0.0.1: that and any address, also as IPv6's, in either byte order.
_FAR_LOOPBACK = [begin + end for begin in (b"", b"0" * 24, b"0" * 16 + b"FFFF0000",
                                           b"0" * 20 + b"FFFF")
                 for end in (b"0100007F", b"7F000001", b"00000000")]


def far_owner(asked, answers, deadline, target, path, *ports, is_first=False):
    """Ask over there whose the server is: "" for our user's; NO_SHELL; NOT_SAID.

    Where we are root there, another user's number is returned; where we are not, PermissionError.
    ConnectionError: there is a shell, and it does not say it. `is_first`: maybe there is none.
    """
    said = _hear(asked, answers, deadline, target)
    if is_first and b"hotrepl s" not in said:
        return NO_SHELL
    lines = [line.split() for line in said.partition(_SHELL_STARTS)[2].splitlines()] or [[]]
    user, told = lines[0][1:], [words[0] for words in lines if len(words) == 1]
    # Of paths both files: else others could put theirs there, and take it away before each look.
    has_rows = len(told) == 2 if path else any(words[:1] == [b"sl"] for words in lines)
    if lines[-1] != [b"hotrepl", b"end"] or not user or (
            [b"hotrepl", b"table"] in lines and not has_rows):
        raise ConnectionError(errno.ECONNABORTED, "%s can't say whose server is there%s, so "
                              "nothing was sent" % (target, ", or there is none" if path else ""))
    if path:
        owners = set(told)
    else:
        ends = [b"%s:%04X" % each for each in itertools.product(_FAR_LOOPBACK, ports)]
        # Listeners, and connections that somebody has accepted.
        owners = {words[7] for words in lines if len(words) > 9 and words[1] in ends
                  and (words[3] == b"0A" or words[9] != b"0")}
    others = printable(b", ".join(sorted(owners.difference(user))).decode("ascii", "replace"))
    if not owners and has_rows:
        raise ConnectionError(errno.ECONNREFUSED, "no server listens at %s port %d, so nothing "
                              "was sent" % (target, ports[0]))
    if others and user != [b"0"]:
        raise PermissionError(errno.EACCES, "the server at %s is uid %s's over there, not that of "
                              "whom ssh lets in, so nothing was sent" % (target, others))
    return others if owners else NOT_SAID


_SHELL_STARTS = b"hotrepl shell\n"


def _hear(asked, answers, deadline, target):
    """Ask for one answer, and return all that is said until its end, or until nothing comes."""
    said = b""
    with suppress(OSError):
        # It has ended.
        os.write(asked, b"\n")
    end = deadline or time.monotonic() + ANSWER_LIMIT_S
    while not (_SHELL_STARTS in said and said.endswith(b"hotrepl end\n")):
        left_s = end - time.monotonic()
        if left_s < 0 or len(said) > FAR_LIMIT_BYTES or not (
                select.select([answers], [], [], left_s)[0]):
            time_left_s(deadline)
            raise ConnectionError(errno.ETIMEDOUT, "%s does not say in time whose server is there, "
                                  "so nothing was sent" % target)
        piece = os.read(answers.fileno(), RECEIVE_BYTES)
        if not piece:
            break
        said += piece
    return said


def tell_far_owner(target, whose):
    """Tell the user whose server it is on the far side of ssh, if not ours.

    Return whether it may be ours.
    """
    is_known = whose not in (NO_SHELL, NOT_SAID)
    if whose:
        say("the server at %s %s" % (target, "is uid %s's over there" % whose if is_known else
                                     "may be any user's over there: nobody there told us"))
    return not (whose and is_known)


def dial(address, ssl_context, is_plain, deadline, is_roots=False):
    """Return a socket that is connected to a server, and the uid of its owner; None: unknown.

    Nothing has been sent. PermissionError: it may be another's, and neither TLS nor `is_plain`, the
    user's word, vouches for it. `is_roots`: root holds it, as far as is known.
    """
    where = "unix:" + address if isinstance(address, str) else "%s port %d" % address
    try:
        sock = connect_to(address, deadline, is_roots)
    except OSError as exc:
        if deadline is not None and isinstance(exc, socket.timeout):
            raise
        raise OSError(exc.errno, "nobody answers at %s (%s); start a server there with "
                      "'python hotrepl.py serve' or hotrepl.start()"
                      % (where, exc.strerror or exc)) from exc
    try:
        owner = _check_owner(sock, where, ssl_context is not None or is_plain)
        if ssl_context is not None:
            sock = _encrypted(sock, ssl_context, where, deadline)
        # A stopped process answers nothing at all.
        sock.settimeout(time_left_s(deadline))
        return sock, owner
    except BaseException:
        sock.close()
        raise


def connect_to(address, deadline, is_roots):
    """Return a connected socket; localhost is 127.0.0.1 first, where servers usually listen."""
    if isinstance(address, str):
        found = [(socket.AF_UNIX, address)]
    else:
        name, port = address
        with suppress(UnicodeEncodeError):
            # As text Python would load its tables of international names for it.
            name = name.encode("ascii")
        found = [(each[0], each[4]) for host in (
            (DEFAULT_BIND, "::1") if name == b"localhost" else (name,))
            for each in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)]
    for family, place in found:
        sock = None
        try:
            # It may be that this system has no IPv6.
            sock = socket.socket(family, socket.SOCK_STREAM)
            if family != socket.AF_UNIX:
                if not is_roots:
                    # To look takes a system call for each open file of the machine.
                    come_as_its_user(sock, place)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(time_left_s(deadline, None))
            sock.connect(place)
            return sock
        except OSError as exc:
            error = exc
            if sock is not None:
                sock.close()
    raise error


def _check_owner(sock, where, is_vouched):
    """Return the uid of a server's owner; PermissionError if it isn't ours, and nobody vouches.

    Root may visit another user's, as it may do all else, and is told so.
    """
    ours, owner = effective_uid(), server_owner(sock)
    if owner is None and not is_vouched:
        # So it is behind a container's published port, too.
        raise PermissionError(errno.EACCES, "the system can't tell whose server is at %s, so "
                              "nothing was sent; come by --tls or ssh, or pass --plain to send "
                              "all, a token too, in clear text" % where)
    if owner not in (None, ours):
        said = "the server at %s is %s" % (where, "uid %d's" % owner if owner != NUMBERLESS else
                                           "a user's who has no number here")
        # 0 in a user namespace is not root.
        if not (is_vouched or ours == 0 and owner != NUMBERLESS):
            raise PermissionError(errno.EACCES, said + ", not yours, so nothing was sent; 'list' "
                                  "shows yours")
        say(said)
    return owner


def _encrypted(sock, ssl_context, where, deadline):
    """Return a plain socket that talks through TLS over `sock`; a thread carries the bytes."""
    name = "localhost" if where.startswith("unix:") else where.partition(" ")[0]
    try:
        sock.settimeout(time_left_s(deadline))
        tls = ssl_context.wrap_socket(sock, server_hostname=name)
    except (OSError, ValueError) as exc:
        # ssl.SSLError is an OSError.
        if deadline is not None and isinstance(exc, socket.timeout):
            raise
        raise ConnectionError(errno.EPROTO, "no TLS with %s: %s; the server must have an "
                              "ssl_context, and --cafile must name who signed its certificate"
                              % (where, exc)) from exc
    inner, outer = socket.socketpair()
    threading.Thread(target=carry, args=(tls, inner), name="hotrepl client TLS",
                     daemon=True).start()
    return outer


def show_token(sock, confirm_owner, tokens, deadline, hint):
    """Answer the server's questions for a token; return the right one, or None.

    `hint` is what else may be the reason where it does not let us in.
    """
    token = None
    while True:
        begin = b""
        with suppress(ConnectionError):
            # It is closed.
            begin = sock.recv(1, socket.MSG_PEEK)
        if not begin:
            raise ConnectionError(errno.ECONNREFUSED, "the server does not let us in; its log says "
                                  "why" + hint)
        if token is None:
            confirm_owner()
        if begin != TOKEN_PROMPT[:1]:
            return token
        for _ in TOKEN_PROMPT:
            sock.settimeout(time_left_s(deadline))
            sock.recv(1)
        token = next(tokens, None)
        if token is None:
            raise PermissionError(errno.EACCES, "the server wants its token; pass --token-file or "
                                  "set HOTREPL_TOKEN; its log or its owner can name the file")
        sock.sendall(token.encode("utf-8") + b"\n")


def tokens_to_show(address, token, is_ours, is_trusted):
    """Yield what may be the token: as we were told, as a server of ours left it, as is typed.

    What the environment says is for servers that are not known to be another user's.
    """
    import getpass
    token = token or is_trusted and os.environ.get("HOTREPL_TOKEN")
    if token:
        yield token
    elif is_ours:
        yield from stored_tokens(address)
    while sys.stdin is not None and sys.stdin.isatty():
        try:
            typed = getpass.getpass("token: ")
        except EOFError:
            return
        yield typed


# === 11. Sessions ============================================================
# A Session is one client's conversation: connection, number, turns, last value, last exception.
# An Evaluator is the thread that holds it: console, streams, interrupts. One turn of it:
#
#     Session.read      what was printed and is not sent, the turn's kind, prompt and mark go out
#                       in one piece; then recv blocks. Nothing is polled.
#     Evaluator._take_  one method for each kind of input: a line, a block, Ctrl+C, ...
#     the console       compiles it (section 6), and calls run_code for each code object
#     run_code          lends `_`, opens the interrupts, runs the code, closes and takes back
#     the next read     sends the value with the next prompt; values shown in the middle of an
#                       input, and tracebacks, went through stdout and stderr
#
# A failed send only sets a flag, which the next read turns into end-of-file: a dead peer is its
# own session's business. There, and only there, print() raises BrokenPipeError for it, as into a
# pipe, so that no loop goes on for nobody. Who may call what:
#
#     the evaluator's thread      read, greet, run_awaitable, release; all of Evaluator
#     a control connection's      interrupt, background, complete, where, may_pair, use_marks, ...
#     the Flusher's               Connection.tick
#     any                         close, Connection.send_note
#
# Two locks, in this order: the connection's, held while something is sent, and the session's, for
# its turn and who waits. Ctrl+Z (`background`) takes both: no turn can begin meanwhile, and from
# then on the old Evaluator prints into its job, the new one to the client.

VALUE_LIMIT = 10000               # characters of a value that a terminal shows
PAIRING_TIMEOUT_S = 5.0           # how long a control connection waits for its session's secret


class Connection:
    """The socket of a session: what is to be sent, in order, and the marks in it."""

    def __init__(self, sock, received=b""):
        self.sock = sock
        self._received = received         # what came before the connection was handed to us
        self.lock = threading.RLock()     # one sender at a time; held while a slow client reads
        self.is_broken = False    # a send failed: the peer is gone
        self.is_shut = False      # ended from outside: what has come and is unread counts no more
        self.has_marks = False    # the client asked for turn marks; guarded by lock, as all below
        self.has_kinds = False    # and to be told what each turn is for, ...
        self.has_streams = False  # ... and for stream marks
        self.sending = None       # (bytes sent, of how many) in the middle of much; of the sender
        self._is_dropping = False  # what the sender has left of what was printed is not wanted
        self._stream = None       # kind of the stream whose data was put last
        self._outbox = []         # bytes to be sent; _Kept: not what a program printed
        self._is_corked = False   # collect only

    def send(self, data, stream="stdout"):
        """Send `data`, bytes that a program printed; blocks while the client is slow."""
        with self.lock:
            self.put(data, stream)
            if not self._is_corked:
                self.flush()

    def put(self, data, stream="stdout"):
        """Have `data` sent by the next `flush`; the caller holds the lock, as for put_turn."""
        if self.has_streams and stream != self._stream:
            self._stream = stream
            self._outbox.append(_Kept(BEGIN + STREAM_KINDS[stream] + END))
        if self.has_marks and IAC in data:
            data = data.replace(IAC, IAC + IAC)
        self._outbox.append(data)

    def put_turn(self, kind, prompt=""):
        """Have a wait for input announced by the next `flush`: of what kind, and its prompt."""
        if self.has_kinds:
            self._outbox.append(_Kept(BEGIN + TURN_KIND + kind.encode("ascii") + END))
        elif kind == "secret" and self.has_marks:
            self._outbox.append(_Kept(NO_ECHO))
        if prompt:
            self.put(_Kept(prompt.encode("utf-8", "backslashreplace")), "prompt")
        if self.has_marks:
            self._outbox.append(_Kept(GO_AHEAD))

    def send_note(self, text):
        """Send lines of no evaluation; a client with marks shows them above its prompt."""
        data = text.encode("utf-8", "backslashreplace")
        self.send_own(BEGIN + NOTE_KIND + data + END if self.has_marks else data)

    def send_own(self, data):
        """Send `data` as it is: words and marks of ours, not what a program printed."""
        with self.lock:
            self._outbox.append(_Kept(data))
            self.flush()

    def flush(self, may_block=True):
        """Send all that was put; blocks while the client is slow, unless told not to."""
        outbox, self._outbox = self._outbox, []
        data = b"".join(outbox)
        if not data or self.is_broken:
            return
        try:
            if not may_block:
                sent = self.sock.send(data, getattr(socket, "MSG_DONTWAIT", 0) | NO_SIGNAL)
                self._outbox = [_Kept(data[sent:])]
            elif len(data) <= CHUNK_BYTES:
                self.sock.sendall(data, NO_SIGNAL)
            else:
                self._send_much(outbox, len(data))
        except BlockingIOError:
            self._outbox = outbox
        except (OSError, ValueError):
            self.is_broken = True

    def drop_rest(self):
        """Have a sender in the middle of much leave out what was printed; from any thread."""
        self._is_dropping = self.sending is not None

    def _send_much(self, outbox, total):
        """Send in parts, and let `drop_rest` come in between: `sending` says how far it is."""
        self._is_dropping, self.sending, sent = False, (0, total), 0
        try:
            for item in outbox:
                for piece in pieces_of(item):
                    if self._is_dropping and not isinstance(item, _Kept):
                        break
                    self.sock.sendall(piece, NO_SIGNAL)
                    sent += len(piece)
                    self.sending = sent, total
        finally:
            self.sending = None

    def tick(self, flush, is_patient=False):
        """Call `flush` to collect what was printed, and send what the peer takes at once.

        Does nothing where somebody is sending just now, unless it `is_patient`.
        """
        if self.lock.acquire(is_patient):
            try:
                self.collect(flush)
                self.flush(may_block=False)
            finally:
                self.lock.release()

    def collect(self, function):
        """Call `function`; what it sends is only put. The caller holds the lock."""
        self._is_corked = True
        try:
            function()
        finally:
            self._is_corked = False

    def receive(self):
        """Return what came, b"" at end-of-file; blocks."""
        if self.is_broken:
            return b""
        received, self._received = self._received, b""
        try:
            return received or self.sock.recv(RECEIVE_BYTES)
        except (OSError, ValueError):
            return b""

    def is_left(self):
        """Return whether the client has gone, also while nothing is read; does not block.

        Of a client without marks only a failed send tells: it may have closed its sending half
        alone, as `printf ... | nc` does.
        """
        if self.is_broken or not self.has_marks or not hasattr(socket, "MSG_DONTWAIT"):
            return self.is_broken
        try:
            return not self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            return True

    def shut(self):
        """Wake whoever reads or writes here: nothing comes any more; from any thread."""
        self.is_broken = self.is_shut = True
        shut_down(self.sock)

    def close(self):
        """Send the rest, say goodbye and close."""
        with self.lock:
            if self.has_marks:
                # So the client knows that it was meant to end.
                self._outbox.append(_Kept(END_OF_FILE))
            self.flush()
            if not self.is_broken and is_own(self.sock):
                shut_down(self.sock, socket.SHUT_WR)
                drain(self.sock)
            self.is_broken = True
            self.sock.close()


class _Kept(bytes):
    """Bytes that are sent in any case, as the client needs them to follow: marks and prompts.

    What a program printed is not such, and is dropped after a Ctrl+C.
    """


# What continues a character, or an IAC that may be the first half of a doubled one.
_WITHIN = Lazy(lambda: re.compile(rb"[\x80-\xbf\xff]*"))


def pieces_of(data):
    """Yield `data` in parts, none of which ends within a character or a doubled IAC."""
    begin, view = 0, memoryview(data)
    while begin < len(data):
        end = _WITHIN.match(data, begin + CHUNK_BYTES).end()
        yield view[begin:end]
        begin = end


class Session:
    """One client's conversation with the process.

    A turn is counted when it is announced. What is evaluated after it is "of" that turn: by its
    number a client says what it means to interrupt, and what is over meanwhile is left alone.
    """

    def __init__(self, server, number, connection, peer):
        self.server = server
        self.number = number
        self.connection = connection
        self.peer = peer
        self.turn = 0             # how many waits for input were announced; guarded by _lock
        self._begun_turn = 0      # the last one at a prompt; what follows is of its evaluation
        self.terminal_size = None  # the client is a terminal of so many columns and lines ...
        self.has_colours = False  # ... and it shows colours
        self.value = None         # of the last expression that was displayed: `_`
        self.error = server.error  # the exception that was shown last: pdb.pm()
        self.evaluator = None     # the thread that holds the session
        self._lock = threading.Lock()
        self.place = None         # fields of the Place command, for the next block
        self.knows_children = False       # it was said where child processes print
        self.is_copy = False      # this is a child that was forked; nobody is connected
        self._waiting = None      # the kind of turn while it waits for the client; _lock
        self._wakers = ()         # (ours, for whoever ends a wait in an evaluation), during one
        self._inputs = InputDecoder()     # what the client sent
        self._first_bytes = FirstBytes()
        self._secret_came = threading.Event()     # what the client sent first has been read
        # Told on this channel to its client, it passes for the token on the control channel.
        self.proof = make_token()
        self._own_loop = None     # an OwnLoop, once something was awaited that has no other
        self._follower = None     # a Follower while follow() is on

    def start(self):
        """Begin the conversation in a thread of its own."""
        self.server.door.audit("begin", session=self.number, peer=self.peer)
        self.evaluator = Evaluator(self)
        self.evaluator.start()

    def greet(self):
        """Send the first lines; they go out with the first prompt."""
        hello = "REPL session %d connected.\n%s" % (self.number, self.server.banner)
        hidden = GUESTS.hidden(self.server.namespace) if self.server.banner else []
        if hidden:
            hello += "The program has names of its own that hide tools: %s.\n" % ", ".join(hidden)
        self.connection.put(hello.encode("utf-8", "backslashreplace"))

    def read(self, evaluator, kind, prompt):
        """Wait for the client and return its next input, (kind, text) as in InputDecoder.

        `kind` is what the turn is for, see AT_PROMPT. Runs in the thread `evaluator`, blocks.
        Detached: the session goes on in another thread.
        """
        try:
            if kind in AT_PROMPT:
                self._announce(evaluator, kind, prompt)
            else:
                evaluator.interrupts.shield(self._announce, evaluator, kind, prompt)
            while not self._inputs.ready:
                self._receive(kind)
            return ("eof", "") if self.connection.is_shut else self._inputs.ready.popleft()
        finally:
            if self.evaluator is evaluator:
                self._waiting = None

    def unread(self, items):
        """Put `items` before what `read` returns next."""
        self._inputs.ready.extendleft(reversed(items))

    def audit_input(self, text, event="input"):
        """Put on record what is about to run, or to be read.

        It raises the interpreter's own audit event too (3.8, PEP 578): an audit hook forbids by
        raising; then `text` must not run.
        """
        # 20 is logging.INFO.
        if "logging" in sys.modules and audit_log.isEnabledFor(20):
            self.audit(event, source=text)
        if _audit is not None:
            _audit("hotrepl.exec", text, self.number)

    def audit(self, event, peer=None, **facts):
        """Put on record what the session does, or `peer` to it.

        Meanwhile this thread prints where the program does: a handler that the session has made for
        its own stderr would show the record to its client.
        """
        evaluator = current_evaluator()
        if evaluator is not None:
            ROUTER.unbind()
        try:
            self.server.door.audit(event, session=self.number, peer=peer or self.peer, **facts)
        finally:
            if evaluator is not None:
                evaluator.bind()

    def use_marks(self, has_kinds, has_streams):
        """Mark turns from now on; where a prompt is already out, its mark follows at once."""
        with self.connection.lock:
            self.connection.has_marks = True
            self.connection.has_kinds = has_kinds
            self.connection.has_streams = has_streams
            with self._lock:
                kind = self._waiting
            if kind is not None:
                self.connection.put_turn(kind)
            self.connection.flush()

    def interrupt(self, turn=None, is_answered=False):
        """Raise KeyboardInterrupt in the evaluation, or end the wait for input, as Ctrl+C does.

        `turn` is the last that the client saw, `is_answered` whether it has answered that; None: it
        does not know. What is over is not interrupted; an answer that is still on its way here is.
        """
        with self._lock:
            if turn not in (None, self.turn) and not (is_answered and turn >= self._begun_turn):
                # Too late: that one is over.
                return
            waits_at_prompt = self._waiting in AT_PROMPT and not is_answered
            if waits_at_prompt:
                self.turn += 1
                self._begun_turn = self.turn
            elif is_answered or turn is None or self._waiting:
                self.evaluator.interrupts.request()
        if waits_at_prompt:
            self._prompt_again()
        else:
            self.connection.drop_rest()
            self._wake()

    def background(self, turn=None):
        """Turn what is evaluated into a job and go on in a new thread; return the Job.

        ProtocolError: nothing is evaluated, or what the client saw as turn `turn` is over.
        """
        self.connection.drop_rest()
        with self.connection.lock, self._lock:
            old = self.evaluator
            if self._waiting or turn not in (None, self.turn):
                raise ProtocolError("nothing is being evaluated")
            old.flush()
            old.detach()
            self.evaluator = Evaluator(self, old.console)
        self.evaluator.start()
        return old

    def describe_outcome(self):
        """Return how the last input ended or stands, for the Outcome command."""
        result = self.evaluator.result
        return dict(result.facts, state="waiting" if self._waiting in IN_EVALUATION
                    else result.state)

    def complete(self, line, cursor=None):
        """Return the Completions at `cursor` in `line`.

        A thread of its own looks for them, up to COMPLETION_TIMEOUT_S: an object's __dir__ may
        hang, or raise what is no Exception. Then none are found.
        """
        names = debugged_names(self.evaluator) if self._waiting in IN_EVALUATION else None
        job = Job(complete, self.server.namespace if names is None else names, line, cursor,
                  before="\n".join(self.evaluator.console.buffer),
                  overlay={} if self.value is None else {"_": self.value})
        job.start()
        job.join(COMPLETION_TIMEOUT_S)
        if job.state == "running":
            async_raise(job, SystemExit)
        return job.value or Completions(len(line), [], None)

    def run_awaitable(self, function):
        """Return the result of a function that has to do with coroutines; called where they run.

        By what start() was given: `run_coroutine`, `loop`, or a loop of the session's own.
        """
        own = current_evaluator()
        try:
            if self.server.run_coroutine is not None:
                return run_by(self.server.run_coroutine, own.context, function)
            if self.server.loop is None and self._own_loop is None:
                self._own_loop = OwnLoop()
            return run_on_loop(self.loops()[0], own.context, function)
        except (KeyboardInterrupt, SystemExit):
            # What goes on there keeps the other one.
            own.context = own.context.copy()
            raise

    def loops(self):
        """Return the asyncio loops that the session knows."""
        loops = [self.server.loop, self._own_loop and self._own_loop.loop]
        return [loop for loop in loops if loop is not None]

    def follow(self, is_wanted):
        """Begin or end to show what the program's threads print and log."""
        if is_wanted and self._follower is None:
            self._follower = Follower(self.evaluator, self.connection.send_note)
            FOLLOWERS.add(self._follower)
        elif not is_wanted and self._follower is not None:
            FOLLOWERS.remove(self._follower)
            self._follower = None

    def where(self):
        """Return what the evaluation does just now, as one line, or None."""
        import linecache
        frame = sys._current_frames().get(self.evaluator.ident)
        while frame is not None and frame.f_code.co_filename == _THIS_FILE:
            frame = None if frame.f_code is Evaluator.run.__code__ else frame.f_back
        if self._waiting or frame is None:
            return None
        code = frame.f_code
        text = "%s, line %d, in %s" % (code.co_filename, frame.f_lineno, code.co_name)
        line = linecache.getline(code.co_filename, frame.f_lineno).strip()
        return "%s: %s" % (text, line) if line else text

    def may_pair(self, peer, secret):
        """Return whether a control connection of `peer` that shows `secret` may pair with us.

        Blocks up to PAIRING_TIMEOUT_S: the session's own secret may still be on its way here.
        """
        if secret is not None:
            self._secret_came.wait(PAIRING_TIMEOUT_S)
            return (bool(self._inputs.secret)
                    and compare_digest(secret.encode("utf-8", "replace"), self._inputs.secret))
        is_same_user = peer.uid is not None and peer.uid == self.peer.uid
        return not self._inputs.secret and is_same_user

    def close(self):
        """End the session from outside: at once at a prompt, by SystemExit in an evaluation."""
        self.connection.shut()
        if self.evaluator is not None:
            self.evaluator.interrupts.request(SystemExit)
        self._wake()

    def release(self):
        """At the session's end: say goodbye, and let go of what it held."""
        try:
            self.connection.close()
        finally:
            if self.error is not None:
                _forget_error(self.error)
            self.error = None
            self.follow(False)
            self.keep_value(None)
            if self._own_loop is not None:
                self._own_loop.close()

    def keep_value(self, value):
        """Let `_` be `value`.

        What goes with the last one does so in an eval(): a warning that it was never awaited then
        does not name this file.
        """
        last, self.value = [self.value], value
        if type(last[0]) not in _PLAIN:
            eval(_CLEAR, {"values": last})

    def forget(self):
        """In a forked child: close our copy of the socket, which leaves the parent's alone."""
        self.is_copy = True
        self.connection.is_broken = True
        self.connection.lock = threading.RLock()
        self.connection.sock.close()

    def _announce(self, evaluator, kind, prompt):
        """Send what was printed, the prompt and the turn's marks in one piece; note that we wait.

        Where input is there already, as of a paste, all goes out with a later prompt.
        """
        connection = self.connection
        with connection.lock:
            connection.collect(evaluator.flush)
            with self._lock:
                if self.evaluator is not evaluator:
                    raise Detached
                # Both under the lock: from here on an interrupt is for this turn.
                self.turn += 1
                self._waiting = kind
                if kind in AT_PROMPT:
                    self._begun_turn = self.turn
                    evaluator.interrupts.expect()
            connection.put_turn(kind, prompt)
            if not self._inputs.ready:
                connection.flush()

    def _receive(self, kind):
        """Block until something comes, and take it apart."""
        # Without a limit the prompt needs no waker: `_prompt_again` serves it.
        if kind in IN_EVALUATION or self.server.idle_timeout_s is not None:
            if not self._wait_for_data():
                self._end_idle()
        data = self.connection.receive()
        if not self._first_bytes.is_over:
            data = self._without_foreign(data)
        if data:
            self._inputs.feed(data)
        else:
            self._inputs.close()
        if self._inputs.asks_for_control:
            self._inputs.asks_for_control = False
            self._name_control()
        if not self._secret_came.is_set() and (self._inputs.secret or self._inputs.ready):
            self._secret_came.set()

    def _without_foreign(self, data):
        """Return `data`, or b"" where a connection begins with what another protocol says."""
        foreign = self._first_bytes.feed(data or b"\n")
        if not foreign:
            return data
        # Not even the half of a line runs.
        self._inputs = InputDecoder()
        self.connection.shut()
        # What `serve` says of it goes to the program's stderr, not to this client.
        ROUTER.unbind()
        self.server.door.refuse(self.peer, foreign, session=self.number)
        return b""

    def _name_control(self):
        """Tell the client the port of the control channel, and what to show there as a token."""
        address = self.server.control_address
        port = 0 if isinstance(address, str) else address[1]
        self.connection.send_own(BEGIN + CONTROL_KIND + b"%d %s" % (port, self.proof) + END)

    def _wait_for_data(self):
        """Return whether there is something to receive, before the session has idled too long."""
        # No descriptor is to be lost on the way.
        shield = self.evaluator.interrupts.shield
        try:
            shield(self._make_wakers)
            return bool(wait_for([self._wakers[0], self.connection.sock],
                                 timeout_s=self.server.idle_timeout_s))
        except (OSError, ValueError):
            # The connection was closed meanwhile: receive() tells.
            return True
        finally:
            shield(self._drop_wakers)

    def _end_idle(self):
        """End a session that has waited for input too long; its client is told."""
        self.connection.send_note("\nhotrepl: no input for %g s, this session ends\n"
                                  % self.server.idle_timeout_s)
        self.audit("idle")
        self.close()

    def _make_wakers(self):
        """Make a pair: the wait looks at one, who ends it sends a byte into the other."""
        self._wakers = socket.socketpair()

    def _drop_wakers(self):
        """Close the pair, once the wait is over."""
        wakers, self._wakers = self._wakers, ()
        for each in wakers:
            each.close()

    def _wake(self):
        """End the wait of an input() in an evaluation, from any thread."""
        with suppress(OSError):
            # The wait was over just now.
            for each in self._wakers[1:]:
                each.send(b"!", NO_SIGNAL)

    def _prompt_again(self):
        """Show a new prompt while the thread goes on waiting: Ctrl+C at the prompt."""
        self.evaluator.console.resetbuffer()
        # Not under the lock: it may run the program's code.
        turn = self.evaluator.prompt()
        with self.connection.lock:
            self.connection.put(b"\nKeyboardInterrupt\n", "stderr")
            self.connection.put_turn(*turn)
            self.connection.flush()


_audit = getattr(sys, "audit", None)


# --- What every session needs, loaded ahead ---
# A program may call os.chroot() or setuid(), and then nothing can be imported any more. So what
# sessions need of the standard library is loaded a moment after start() has returned, in a thread
# of the server's, or by the first session where that comes sooner. LOADING is held meanwhile: a
# fork waits for it (section 13).

LIBRARY = [name for name, is_needed in (
    ("ctypes", not IS_PYPY), ("dis", sys.version_info >= (3, 14)),
    ("_contextvars", sys.version_info >= (3, 7)), ("code", True), ("re", True), ("codeop", True),
    ("linecache", True), ("traceback", True), ("ast", True), ("copy", True), ("getpass", True),
    ("json", True)) if is_needed]
LOADING = threading.Lock()        # held in imports, as a child forked then could never make them
LOADING_DELAY_S = 0.01            # how long a server waits with that; start() has returned by then


def note_program():
    """Have the sources of the program noted, once a server has started."""
    # New ones are parsed, which may import something.
    with LOADING:
        note_sources()


def load_library():
    """Import all that sessions need, while it can be found: after os.chroot, say, nothing can.

    Besides import_library() that is what the first interrupt and the first traceback use.
    """
    import_library()
    with LOADING, SHORT_TURNS:
        _async_raiser()
        _enters(_checkpoint.__code__)
        _format_exception(Exception, Exception(), None)


def import_library():
    """Import what a session needs from its beginning.

    ImportError names the files of the program that hide such a module.
    """
    _import_library(*map(sys.modules.get, LIBRARY))


@functools.lru_cache(1)
def _import_library(*modules):
    """Do it, once for the same `modules`: those of LIBRARY that are loaded, and found to be right.
    """
    with LOADING, SHORT_TURNS:
        hiding = [path for path in map(_hiding_file, LIBRARY) if path]
        if hiding:
            raise ImportError("%s: rename what hides a module of the standard library"
                              % ", ".join(hiding))
        try:
            for name in LIBRARY:
                __import__(name)
        except ImportError as exc:
            raise ImportError("%s; a program that calls os.chroot or the like right after start() "
                              "has to call hotrepl.load_library() in between" % exc) from exc


class ShortTurns(Installed):
    """Within this a thread that computes gets shorter turns, so that we come to ours sooner.

    Each time that a call of ours waits, it would else compute for 5 ms before we go on.
    """

    SHORT_S = 64e-6               # sys.getswitchinterval() gives the same number back

    def __init__(self):
        super().__init__()
        self._before = 0.0        # the program's interval, while ours is set; guarded by _lock

    def _install(self):
        self._before = sys.getswitchinterval()
        # Else it may be that of another copy of this file.
        if self._before > self.SHORT_S:
            sys.setswitchinterval(self.SHORT_S)

    def _uninstall(self):
        # What the program has set meanwhile stays.
        if self._before > self.SHORT_S == sys.getswitchinterval():
            sys.setswitchinterval(self._before)


SHORT_TURNS = ShortTurns()


def _hiding_file(name):
    """Return the path of the file that hides the standard library's module `name`, or None."""
    if name in sys.modules:
        path = getattr(sys.modules[name], "__file__", None)
    else:
        # Not by an import, which would run it: it may be the program's own script.
        spec = sys.modules["_frozen_importlib_external"].PathFinder.find_spec(name)
        path = spec and spec.origin
    own = os.path.join(os.path.dirname(os.__file__), name)
    own = own + ".py" if os.path.isfile(own + ".py") else os.path.join(own, "__init__.py")
    is_known = path is not None and os.path.isfile(path) and os.path.isfile(own)
    return path if is_known and not os.path.samefile(path, own) else None


# --- Evaluator: the thread that runs the inputs ---
# What an evaluation changes around itself, `run_code` takes back, in whatever way it ends:
#     interrupts       on in Interrupts.run alone
#     `_`              lent by _Lent, where the name is free
#     a trace function the user's own while the input runs, none in between
#     sys.ps1, ps2     as before, unless the input names them
# Ctrl+Z: the thread goes on as a Job; another Evaluator has the session, and a copy of
# its console.

class Detached(BaseException):
    """This thread's session goes on in another; what it evaluated has become a job."""


class Evaluator(Job):
    """The thread that runs a session's inputs: one console, its streams, its interrupts.

    Ctrl+Z makes it a Job: it finishes what it evaluates, and the session goes on in another
    Evaluator with a copy of the console.
    """

    def __init__(self, session, console=None):
        super().__init__(None)
        self.result.state = "done" if console is None else "background"       # of the last input
        self.name = "hotrepl session %d" % session.number
        self.session = session
        self.interrupts = Interrupts()
        self.console = console    # to go on with a copy of; None: make one, in the thread itself
        self.is_detached = False  # it is a job now, and the session has another Evaluator
        self.context = None       # contextvars': what it evaluates runs in it; set by `run`
        self.trace = None         # what sys.settrace set at the prompt, or threading's
        self._last_only = None    # a list: values are to be kept in it, not displayed
        self._lent = None         # `_` in the namespace of the evaluation, as long as that runs
        self._unsent = None       # the text of a value, which goes out with the next prompt
        self._acquired = []       # what stands in the process for us: Installed
        stdout = SessionStream("stdout", session.connection, self.interrupts, flusher=FLUSHER)
        stderr = SessionStream("stderr", session.connection, self.interrupts, earlier=stdout)
        self.streams = {"stdin": SessionInput(self._ask), "stdout": stdout, "stderr": stderr}
        self._bound = (None,) * 4  # the stand-ins in sys behind which they are; see ROUTER.bind

    def run(self):
        """Hold the session from its first line to its end, or until Ctrl+Z makes this a job.

        All that it sets in the process it has acquired; `_end` takes it back, whatever happens.
        """
        self.interrupts.adopt()
        self.trace = sys.gettrace()
        sys.settrace(None)
        _here.evaluator = self
        try:
            if self.console is None:
                self.session.greet()
                import_library()
                self.context = new_context()
            for each in (ROUTER, DEBUGGERS):
                each.acquire()
                self._acquired.append(each)
            DEBUGGERS.look()
            self.bind()
            self._prepare_console()
            self._converse()
        except Detached:
            pass
        except BaseException as exc:
            # This is the outermost frame of the thread: nobody else would tell.
            log.exception("session %d ended by an error of hotrepl", self.session.number)
            self.session.connection.send(b"hotrepl: the session can't go on: %s\n"
                                         % _message(exc).encode("utf-8", "backslashreplace"))
        finally:
            self._end()

    def bind(self):
        """Have our thread read from and print to the session, whatever sys has had since."""
        self._bound = ROUTER.bind(self.streams, self._bound)

    def detach(self):
        """Become a job; the session's lock and its connection's are held."""
        self.is_detached = True
        self.interrupts.withdraw()
        for name in ("stdout", "stderr"):
            self.streams[name].sink = self.output
        self.name = "hotrepl job " + shorten(" ".join(self.console.source.split()), 40)
        JOBS.add(self)

    def prompt(self):
        """Return (kind, text) of the prompt that is due."""
        if self.console.buffer:
            return "continuation", prompt_text("ps2", "... ")
        return "primary", prompt_text("ps1", ">>> ")

    def run_code(self, code_object, namespace, use=None, runcode=None):
        """Run `code_object`; show the value of an expression, or call `use` with it.

        `runcode` runs it instead, unless it awaits. Interrupts are on, and only here. The text of
        the value goes out with the next prompt, where that is soon.
        """
        if not ROUTER.is_bound(self._bound):
            self.bind()
        if self.session.error is not None:
            self._recall_error()
        run, use = self.interrupts.run, use or self._show
        prompts = _of_sys("ps1"), _of_sys("ps2")
        self._lent = lent = _Lent(namespace, self.session.value)
        try:
            if (code_object.co_flags & CO_COROUTINE
                    or code_object.co_names and self._is_for_loop(code_object.co_names)):
                # As eval() does.
                namespace.setdefault("__builtins__", vars(builtins))
                function = types.FunctionType(code_object, namespace)
                value = run(self.session.run_awaitable, function)
                self._unsent = run(self.context.run, use, value)
            elif runcode is not None:
                run(self.context.run, runcode, code_object)
            else:
                self._unsent = run(
                    self.context.run, _evaluate_here, code_object, namespace, self, use)
        finally:
            if self.trace is not None or sys.gettrace() is not None:
                self._stop_tracing()
            lent.take_back()
            if prompts != (_of_sys("ps1"), _of_sys("ps2")):
                _restore_prompts(prompts, self.console.source)

    def _is_for_loop(self, names):
        """Return whether an input with these names calls what asyncio has only in a loop."""
        return bool(ALLOW_AWAIT and self.session.server.run_coroutine is None
                    and ("asyncio" in sys.modules or "asyncio" in names)
                    and not LOOP_NAMES.isdisjoint(names))

    def answer(self, code_object, namespace, wants_source):
        """Show the docstring or the source of what `code_object` evaluates to."""
        self.run_code(code_object, namespace, show_source if wants_source else doc)

    def display(self, value):
        """Show `value` as an interactive Python does, and keep it for `_`."""
        if self._last_only is not None:
            self._last_only[:] = [value]
            return
        text = self._text_of(value)
        if text is not None:
            self._write_value(text)

    @contextmanager
    def showing_last_value(self, is_wanted):
        """Within this, display nothing; then the last value if `is_wanted` and none raised."""
        self._last_only = shown = []
        try:
            yield
        finally:
            self._last_only = None
        if is_wanted and shown:
            self.display(shown[0])

    def show_exception(self, value, show=None):
        """Send the traceback of an exception to the client, and keep it for pdb.pm().

        `show` sends it instead, if that works.
        """
        kind, frames = type(value), value.__traceback__
        if issubclass(kind, KeyboardInterrupt):
            # CPython ends the program by SIGINT after a KeyboardInterrupt in an exec(), unless
            # another exec() has run since.
            exec("")
            if IS_PYPY:
                # One that has landed in Context.run() leaves that context entered for ever.
                self.context = self.context.copy()
        self.result.exception = value
        if self.is_detached:
            return
        self.session.error = value
        if self.console is not None:
            # pdb.pm() is to find the lines later, too.
            remember_source(self.console.filename, self.console.source)
        text = _format_exception(kind, value, frames)
        if self.session.is_copy:
            _exit_copy(1, text)
        self._recall_error()
        self.result.facts["exception"] = {
            "type": kind.__name__, "message": shorten(_message(value), OUTCOME_LIMIT),
            "traceback": shorten(text, OUTCOME_LIMIT)}
        if show is None and _is_of_program(sys.excepthook, sys.__excepthook__):
            show = functools.partial(sys.excepthook, kind, value, frames)
        if show is None or not self._has_shown(show):
            self._write_traceback(_paint(text) if self.session.has_colours else text)

    def ask_secret(self, prompt):
        """Return a line that the user types unseen, where the client can hide it."""
        sys.stdout.write(prompt)
        line = self._ask("secret")
        if not line:
            raise EOFError
        return line[:-1]

    def hint_at_children(self):
        """Say, once in a session, where child processes print."""
        if not self.session.knows_children:
            self.session.knows_children = True
            print("hotrepl: os.system and child processes print to the program's stdout; "
                  "subprocess.getoutput() shows it here", file=sys.stderr)

    def flush(self):
        """Have all that was printed sent, or put where the connection is corked."""
        # Stderr holds nothing back.
        self.streams["stdout"].text.flush()
        text, self._unsent = self._unsent, None
        if text is not None:
            self.session.connection.put(text.encode("utf-8"), "value")

    def push_out(self):
        """Send all that was printed, as far as the client takes it at once."""
        self.session.connection.tick(self.flush, is_patient=True)

    def _prepare_console(self):
        """Make a console, or copy the one whose evaluation has become a job."""
        if self.console is None:
            self.console = make_console(self.session.server.namespace, self,
                                        self.session.server.console_class)
        else:
            # After Ctrl+Z. A copy has what was defined in the old one, macros too. The job goes on
            # with the old one, its context, and the lines of its input.
            import copy
            job = self.console.evaluator
            self.trace, self.context = job.trace, job.context.copy()
            self.console = copy.copy(self.console)
            self.console.evaluator = self
            self.console.compile = copy.copy(self.console.compile)
            self.console.filename = ""
            self.console.resetbuffer()
            self.console.write("\n%r; fg(%d) fetches its value\n" % (job, job.number))

    def _converse(self):
        """Take one input after the other, until end-of-file or SystemExit."""
        while True:
            try:
                # Before anybody can edit what was imported since the last input.
                note_sources()
            except ImportError as exc:
                # Nothing can be imported any more.
                log.debug("no sources noted: %s", exc)
            kind, text = self.session.read(self, *self.prompt())
            self.started = time.monotonic()
            if kind == "eof":
                return self._finish_input()
            result = self.result = Outcome()
            # A line is nearly every input, and to look for a made-up name takes a while.
            take = self._take_line if kind == "line" else getattr(self, "_take_" + kind)
            try:
                take(text)
            except SystemExit as exc:
                return self._leave(exc)
            except BaseException:
                # What the console's own machinery let escape.
                self.console.resetbuffer()
                self.console.showtraceback()
            finally:
                self.interrupts.close()
                self.streams["stdout"].rearm()
                result.state = "done"

    # Each of these takes one kind of what an InputDecoder has ready.

    def _take_line(self, text):
        """Run a line, or keep it until its statement is complete."""
        if not self.console.buffer:
            # The mark at the beginning of a file that went through nc.
            text = text.lstrip("\ufeff")
        self.session.audit_input(text)
        wants_more = self.console.run_line(text)
        if wants_more and len(self.console.source) > INPUT_LIMIT_BYTES:
            self.console.resetbuffer()
            self._take_invalid("a statement of over %d bytes was dropped" % INPUT_LIMIT_BYTES)

    def _take_block(self, text):
        """Run several lines as one unit, behind what was begun line by line."""
        text = text.lstrip("\ufeff")
        self.session.audit_input(text)
        source = "\n".join(self.console.buffer + [text])
        self.console.resetbuffer()
        place, self.session.place = self.session.place, None
        if place is None or "name" in place:
            self.console.run_block(source, **place or {})
        else:
            self.run_code(Placed.RUN, {"run": Placed(source, **place).run})

    def _take_interrupt(self, _):
        """Drop what was begun: Ctrl+C on the REPL channel, as telnet sends it."""
        self.session.audit("interrupt")
        self.console.resetbuffer()
        self.console.write("\nKeyboardInterrupt\n")

    def _take_invalid(self, reason):
        """Say what was wrong with an input that is not run."""
        self.result.facts["exception"] = {
            "type": "ProtocolError", "message": reason, "traceback": ""}
        self.console.write("hotrepl: %s\n" % reason)

    def _take_timing(self, _):
        """Answer a telnet client, which after Ctrl+C waits for its mark (RFC 860)."""
        self.session.connection.send_own(IAC + b"\xfb\x06")

    def _finish_input(self):
        """At end-of-file, run a block that was piped in: no empty line has ended it.

        Not of a client with marks: it was killed in the middle, or its user did not want the block.
        """
        connection = self.session.connection
        if self.console.buffer and not (connection.is_broken or connection.has_marks):
            with suppress(BaseException):
                self.console.run_line("")

    def _leave(self, exc):
        """End the session as exit() asks for: its status is kept, a text is shown."""
        is_status = exc.code is None or isinstance(exc.code, int)
        status, text = (int(exc.code or 0), "") if is_status else (1, "%s\n" % (exc.code,))
        if self.session.is_copy:
            _exit_copy(status, text)
        if text:
            self.console.write(text)
        # Else it is Session.close() that raised it.
        if not self.session.connection.is_broken:
            self.result.facts["exit"] = status

    def _ask(self, word=None):
        """Return the line that answers what the user's code reads, "" at end-of-file."""
        word = word or ("debugger" if _is_debugger() else "input")
        while not self.is_detached:
            kind, text = self.session.read(self, word, "")
            if kind == "eof":
                break
            if kind == "line":
                self.session.audit_input("(not shown)" if word == "secret" else text, "answer")
                return text + "\n"
            if kind == "interrupt":
                self.session.audit("interrupt")
                raise KeyboardInterrupt
            if kind == "block":
                self.session.unread([("line", line) for line in text.split("\n")])
            else:
                getattr(self, "_take_" + kind)(text)
        return ""

    def _show(self, value):
        """Return `value` as it is to be shown, or have it shown by what does that here."""
        if value is None:
            return None
        if self._last_only is not None or not ROUTER.shows_values(self._bound):
            sys.displayhook(value)
            return None
        text = self._text_of(value)
        if text is not None and len(text) > CHUNK_BYTES:
            # Now, in the evaluation, so that Ctrl+C can drop the rest.
            text = self._write_value(text)
        return text

    def _write_value(self, text):
        """Print the text of a value, marked as such; return None: nothing is left to be sent."""
        self.streams["stdout"].write_as("value", sys.stdout.write, text)

    def _text_of(self, value):
        """Return the line that shows `value`, and keep that for `_`; None: nothing is shown."""
        if value is None:
            return None
        self.result.value = value
        if self.is_detached:
            return None
        try:
            text = repr(value)
        except BaseException as exc:
            self.console.raise_in_input(exc)
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        self.result.facts["value"] = shorten(text, OUTCOME_LIMIT)
        if self.session.terminal_size and len(text) > VALUE_LIMIT:
            cut = VALUE_LIMIT // 2
            text = "%s\n... %d characters left out; print(_) shows all ...\n%s" % (
                text[:cut], len(text) - 2 * cut, text[-cut:])
        self._lent.put(value)
        self.session.keep_value(value)
        return text + "\n"

    def _has_shown(self, show):
        """Return whether `show()`, a console's own or the program's, sends something itself."""
        stdout, stderr = self.streams["stdout"], self.streams["stderr"]
        before = stdout.count, stderr.count
        with suppress(BaseException):
            stderr.write_as("traceback", lambda _: show(), "")
            self.flush()
            return (stdout.count, stderr.count) != before
        return False

    def _write_traceback(self, text):
        """Send a traceback, by the console's write() if that works.

        It may be the class's own and raise, or there may be no console yet.
        """
        stderr = self.streams["stderr"]
        with suppress(BaseException):
            return stderr.write_as("traceback", self.console.write, text)
        stderr.write_as("traceback", stderr.text.write, text)

    def _stop_tracing(self):
        """Trace nothing of ours; what the user, or coverage, set is set again for the next one."""
        trace = sys.gettrace()
        if trace is not None:
            # An exception has left the evaluation before it could take the trace off.
            sys.settrace(None)
            self.trace = trace
        if self.trace is not None and _is_bdb(getattr(self.trace, "__self__", None)):
            self.trace = None

    def _recall_error(self):
        """Have pdb.pm() look at this session's exception, not at another's."""
        error = self.session.error
        if error is not None and getattr(sys, "last_value", None) is not error:
            sys.last_type, sys.last_value = type(error), error
            sys.last_traceback = error.__traceback__
            if sys.version_info >= (3, 12):
                setattr(sys, "last_exc", error)

    def _end(self):
        """Let go of the session, unless it has another thread by now, and of the process."""
        session = self.session
        try:
            self.flush()
            if not self.is_detached:
                session.release()
        finally:
            self.ended = time.monotonic()
            ROUTER.unbind()
            if self.console is not None:
                self.console.forget()
            for each in self._acquired:
                each.release()
            _here.evaluator = self.session = self.console = None
            for each in self.streams.values():
                each.release()
            if not self.is_detached:
                # The last thing of all: from here on stop() does not wait for us.
                session.server.ended(session)


def _evaluate_here(code, names, own, use):
    """Run code with the user's trace function on, and call `use` with the value."""
    settrace, gettrace = sys.settrace, sys.gettrace
    # One line on purpose, and C functions: a debugger started in the session and still stepping
    # when the evaluation returns would otherwise stop at our next line.
    _, value, own.trace, _ = settrace(own.trace), eval(code, names), gettrace(), settrace(None)
    return use(value)


LOOP_NAMES = {"all_tasks", "current_task", "create_task", "ensure_future", "get_running_loop"}
_BUILTINS = vars(builtins)
_CLEAR = compile("values.clear()", "<hotrepl>", "eval")
_PLAIN = {int, float, str, bool, bytes, type(None)}


class _Lent:
    """The session's last value under `_` for one evaluation, where that name is free."""

    def __init__(self, namespace, value):
        is_free = "_" not in namespace and "_" not in _BUILTINS
        self._names = namespace if is_free else {}    # where `_` is lent
        self._value = value       # what `_` is; None: it is not there, as for a last value of None
        if value is not None:
            self._names["_"] = value

    def put(self, value):
        """Let `_` be `value`, unless the user has put something there meanwhile."""
        if self._names.get("_") is self._value:
            self._names["_"] = self._value = value

    def take_back(self):
        """Let the name be free again, unless the user has given it another value."""
        if self._value is not None and self._names.get("_") is self._value:
            del self._names["_"]
        self._names, self._value = {}, None


def prompt_text(name, default):
    """Return sys.ps1 or ps2, which may be any object, as Python shows it; `default` if it can't.

    Its __str__ may even call exit(): that must end no session, or nobody could come in any more.
    """
    try:
        return str(getattr(sys, name, default))
    except BaseException:
        return default


def _restore_prompts(prompts, source):
    """Put prompts back that an input has changed and does not name.

    code.interact() and IPython.embed() leave theirs behind; a user's own `sys.ps1 = ...` stays.
    """
    for name, value in zip(("ps1", "ps2"), prompts):
        if name not in source:
            _put_back(sys, name, value)


def _put_back(owner, name, value, ours=_MISSING):
    """Set an attribute back to `value`, None: take it away; only while it is `ours`, if given."""
    if ours is not _MISSING and vars(owner).get(name) is not ours:
        return
    if value is not None:
        setattr(owner, name, value)
    elif name in vars(owner):
        delattr(owner, name)


def _format_exception(kind, value, frames):
    """Return the traceback of an exception as the user is to see it: without frames of ours."""
    import traceback
    try:
        name = getattr(value, "name", "") if kind in (NameError, AttributeError) else ""
        if isinstance(name, str) and len(name) > 1000:
            # PyPy 7.3 would compare it with all others, for hours.
            value.name = None
        restore_sources()
        shown = traceback.TracebackException(kind, value, frames, lookup_lines=False)
        return "".join(_without_ours(shown).format())
    except BaseException as exc:
        # One that can't even be formatted. No interrupt: they are off.
        return "%s (its traceback can't be shown: %s)\n" % (kind.__name__, type(exc).__name__)


def _without_ours(shown):
    """Return the TracebackException `shown` without frames of this file, in what caused it too.

    Below `_ask` are those of the library in which it waited for the client.
    """
    if shown.stack is not None:
        asking = [k for k, each in enumerate(shown.stack)
                  if each.name == "_ask" and _is_our_file(each.filename)]
        shown.stack[:] = [each for each in shown.stack[:min(asking, default=None)]
                          if not _is_our_file(each.filename)]
    for each in (shown.__cause__, shown.__context__):
        if each is not None:
            _without_ours(each)
    return shown


def _paint(text):
    """Colour a traceback: where it was and what it was."""
    text = re.sub(r'(?m)^(\s+File )(".*?")(, line )(\d+)',
                  "\\1\033[35m\\2\033[0m\\3\033[35m\\4\033[0m", text)
    return re.sub(r"(?m)^([\w.]+)(: .*)?\n?\Z", "\033[1;31m\\1\033[0m\\2\n", text)


def _message(value):
    """Return the text of an exception, or none where its __str__ fails."""
    try:
        return str(value)
    except BaseException:
        # A __str__ may even call exit().
        return ""


def _exit_copy(status, text):
    """In a child that was forked at a prompt: say why, and end it as a script ends."""
    for stream, rest in ((sys.stdout, ""), (sys.stderr, text)):
        with suppress(Exception):
            # The stream is None, closed, or a pipe that nobody reads.
            stream.write(rest)
            stream.flush()
    os._exit(status & 0xFF)


def _forget_error(error):
    """Drop from sys what pdb.pm() looks at, where it is `error`: its frames hold everything."""
    for name in ("last_type", "last_traceback", "last_exc", "last_value"):
        # Asked for each name: another session's may come meanwhile.
        if getattr(sys, "last_value", None) is error:
            _put_back(sys, name, None)


# --- Debuggers: pdb talks to the session in whose thread it is ---
# pdb reads by sys.stdin, which is the session's, so an answer at `(Pdb)` comes by Evaluator._ask.
# What has to be changed is where it begins and ends: at the input's frames, not at ours. While
# there are sessions, pdb.Pdb.set_trace is ours: in a session's thread it makes the debugger one of
# DebuggerMixin; in the program's threads it is as before, but traces by sys.settrace.

def _is_bdb(thing):
    """Return whether something is a debugger of the standard library's kind."""
    return "bdb" in sys.modules and issubclass(type(thing), sys.modules["bdb"].Bdb)


def _is_debugger():
    """Return whether it is a debugger's own prompt that reads from the session just now."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_filename == _THIS_FILE:
        frame = frame.f_back
    return frame is not None and _is_bdb(frame.f_locals.get("self"))


def debugged_names(evaluator):
    """Return the names that an input at `(Pdb)` or in a console of the user's sees, or None."""
    from code import InteractiveInterpreter
    frame, pdb = sys._current_frames().get(evaluator.ident), sys.modules.get("pdb")
    while frame is not None:
        asking = frame.f_locals.get("self")
        if asking is evaluator.console:
            return None
        if issubclass(type(asking), InteractiveInterpreter):
            return asking.locals
        if pdb is not None and issubclass(type(asking), pdb.Pdb) and asking.curframe is not None:
            # Up to 3.12 f_locals would undo what was assigned at the debugger's prompt.
            return dict(asking.curframe.f_globals, **vars(asking).get("curframe_locals")
                        or asking.curframe.f_locals)
        frame = frame.f_back
    return None


class DebuggerMixin:
    """What a session adds to pdb.Pdb: it neither stops in our frames nor shows them."""

    def get_stack(self, frame, frames):
        """Leave out our frames at the stack's beginning."""
        stack, at = super().get_stack(frame, frames)
        first = max((k for k, (each, _) in enumerate(stack[:-1])
                     if _is_plumbing(each.f_code)), default=-1) + 1
        return stack[first:], at - first if at >= first else len(stack) - first - 1

    def stop_here(self, frame):
        """Stop in the frames of the input alone."""
        return not _is_plumbing(frame.f_code) and super().stop_here(frame)

    def dispatch_return(self, frame, value):
        """Stop tracing where the input is at its end: what comes next is ours."""
        result = super().dispatch_return(frame, value)
        if frame.f_back is None or _is_plumbing(frame.f_back.f_code):
            sys.settrace(None)
        return result


class Debuggers(Installed):
    """Has pdb talk to the session in whose thread it is called, while there are sessions.

    On 3.14 all threads would else share one debugger, which follows one of them, belongs to the
    terminal where it was first used, and asks before it quits whether to kill the process. pdb is
    adapted when it is imported, since its import takes longer than all else that a session needs.
    """

    def __init__(self):
        super().__init__()
        self._undo = ExitStack()  # what takes our things out; guarded by _lock, as is the rest
        self._kind = None         # the sessions' class of debuggers, while pdb is adapted

    def look(self):
        """Adapt pdb if it is there already."""
        if "pdb" in sys.modules:
            # This waits for another thread that is still at it.
            import pdb
            self._adapt(pdb)

    def find_spec(self, name, path=None, target=None):
        """As a finder: have pdb adapted once its loader, which is made here, has loaded it."""
        def load(module):
            del spec.loader.exec_module
            spec.loader.exec_module(module)
            self._adapt(module)
        if name != "pdb":
            return None
        from importlib.machinery import PathFinder
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            setattr(spec.loader, "exec_module", load)
        return spec

    def _adapt(self, pdb):
        """Put a stand-in before each way into the debugger, once."""
        with self._lock:
            if not self._users or self._kind is not None or not hasattr(pdb, "Pdb"):
                return
            self._kind = type("SessionPdb", (DebuggerMixin, pdb.Pdb), {})
            for name in ("set_trace", "set_trace_async"):
                if hasattr(pdb.Pdb, name):
                    own = vars(pdb.Pdb).get(name)
                    ours = self._stand_in(getattr(pdb.Pdb, name), pdb.Pdb)
                    setattr(pdb.Pdb, name, ours)
                    self._undo.callback(_put_back, pdb.Pdb, name, own, ours)

    def _install(self):
        sys.meta_path.insert(0, self)

    def _uninstall(self):
        self._undo.close()
        self._kind = None
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _stand_in(self, original, shared):
        """Return what takes the place of `original`, a method that stops the program."""
        def stop(debugger, frame=None, **options):
            frame, last = frame or sys._getframe(1), getattr(shared, "_last_pdb_instance", None)
            if type(debugger) not in (shared, self._kind):
                return original(debugger, frame, **options)
            is_ours = current_evaluator() is not None
            if is_ours and debugger is last:
                debugger = self._kind()
            elif is_ours:
                debugger.__class__, debugger.mode = self._kind, None
            if getattr(debugger, "monitoring_tracer", None) is not None:
                # By monitoring only one thread of a process can be followed.
                debugger.stop_trace()
                debugger.monitoring_tracer, debugger.backend = None, "settrace"
            result = original(debugger, frame, **options)
            if is_ours:
                # Nobody else is to stand at the session's debugger.
                shared._last_pdb_instance = last
            return result
        return stop


DEBUGGERS = Debuggers()


# === 12. Control channel =====================================================
# Requests that must not wait behind the text: a thread for each connection, one method for
# each command of the table in section 3. Every request gets exactly one reply:
#
#     bytes -> MessageDecoder -> check_request -> _do_COMMAND -> {"status": "ok", fields ...}
#     whatever is wrong with it, a ProtocolError above all    -> {"status": "failed", "reason": ...}
#
# All but the first three commands are for the session that the connection is paired with. Their
# methods run in this thread, beside the evaluation, so they ask the Session, which has the locks.
# The Server makes the connection once the Door (section 10) has let it in. A method is named after
# its command, gets the request, whose fields have passed the check, and returns the reply's fields.

class ControlConnection(threading.Thread):
    """One control connection, from its first byte to its last."""

    def __init__(self, server, sock, peer, received=b""):
        super().__init__(name="hotrepl control", daemon=True)
        self.server = server
        self.sock = sock
        self._received = received         # what came before the connection was handed to us
        self.peer = peer
        self.session = None       # the session it is paired with
        self._matches = []        # of the last TabComplete with state 0

    def run(self):
        """Send a reply to each request until the connection ends."""
        try:
            for reply in self._replies():
                self.sock.sendall(encode_message(reply), NO_SIGNAL)
        except (OSError, ValueError) as exc:
            log.debug("control connection lost: %s", exc)
        finally:
            self.sock.close()
            self.server.ended(self)

    def close(self):
        """End the connection, from any thread."""
        shut_down(self.sock)

    def forget(self):
        """In a forked child: close our copy of the socket, which leaves the parent's alone."""
        self.sock.close()

    def _replies(self):
        """Yield the reply to each request that comes, until there can be no more."""
        decoder, first_bytes = MessageDecoder(), FirstBytes(is_control=True)
        data = self._received or self.sock.recv(RECEIVE_BYTES)
        while data:
            foreign = first_bytes.feed(data)
            if foreign:
                return self.server.door.refuse(self.peer, foreign, channel="control")
            try:
                for body in decoder.feed(data):
                    yield self._reply(body)
            except ProtocolError as exc:
                # What follows can't be told apart.
                yield {"status": "failed", "reason": str(exc)}
                return
            data = self.sock.recv(RECEIVE_BYTES)

    def _reply(self, body):
        """Return the reply to one request; never raises."""
        try:
            if isinstance(body, ProtocolError):
                raise body
            command = check_request(body)
            fields = getattr(self, "_do_" + command.name)(body) or {}
            return dict(fields, status="ok")
        except ProtocolError as exc:
            return {"status": "failed", "reason": str(exc)}
        except Exception as exc:
            # Ours, or of an object that was looked at.
            log.debug("control command failed", exc_info=True)
            return {"status": "failed", "reason": "%s: %s" % (type(exc).__name__, exc)}

    def _paired(self):
        """Return the session that the command is for; ProtocolError: there is none."""
        if self.session is None:
            raise ProtocolError("not paired, send PairWithSession first")
        return self.session

    def _do_DescribeServer(self, request):
        """Say what a client has to know before it sends anything else."""
        return {"prompts": {"ps1": prompt_text("ps1", ">>> "), "ps2": prompt_text("ps2", "... ")},
                "control_protocol_version": "1.0", "server_version": __version__,
                "pid": os.getpid(),
                "supported_commands": [command.name for command in COMMANDS]}

    def _do_Authenticate(self, request):
        """Do nothing: who had to show the token has shown it to the Door before it came here."""

    def _do_PairWithSession(self, request):
        """Bind this connection to a session; what does not fit counts as a guess."""
        session = self.server.find_session(request["id"])
        reason = "no session %d that this connection may pair with" % request["id"]
        if not self.server.door.check_guess(self.peer, reason, lambda: session is not None and
                                            session.may_pair(self.peer, request.get("secret"))):
            raise ProtocolError(reason)
        self.session = session
        self.server.door.audit("paired", session=session.number, peer=self.peer)

    def _do_TurnMarks(self, request):
        """From now on mark each wait for input, at once where the session waits."""
        self._paired().use_marks(bool(request.get("kinds")), bool(request.get("streams")))

    def _do_TabComplete(self, request):
        """Look once, for state 0, and answer the states that follow from what was found."""
        session = self._paired()
        if request["state"] == 0:
            found = session.complete(request["text"])
            self._matches = [request["text"][:found.start] + each for each in found.matches]
        in_range = 0 <= request["state"] < len(self._matches)
        return {"result": self._matches[request["state"]] if in_range else None}

    def _do_Complete(self, request):
        found = self._paired().complete(request["line"], request.get("cursor"))
        return {"start": found.start, "matches": found.matches, "hint": found.hint}

    def _do_KeyboardInterrupt(self, request):
        """Do what Ctrl+C does; the reply does not wait for its effect."""
        self._paired().audit("interrupt", self.peer)
        self._paired().interrupt(request.get("turn"), bool(request.get("answered")))

    def _do_Background(self, request):
        return {"job": self._paired().background(request.get("turn")).number}

    def _do_Place(self, request):
        """Note where the next block is from; whether that exists shows when it runs."""
        place = {name: request[name] for name in ("module", "file", "line", "within", "name")
                 if name in request}
        session = self._paired()
        is_placed = (place.get("module") or place.get("file")) and place.get("line", 1) > 0
        if list(place) != ["name"] and ("name" in place or not is_placed):
            raise ProtocolError("expected a module or a file, and a line from 1 on, found %s"
                                % shorten(place))
        session.place = place

    def _do_Where(self, request):
        """Say what a call that does not end is doing, or how far its output is sent."""
        sending = self._paired().connection.sending
        return dict({"sending": sending} if sending else {}, where=self._paired().where())

    def _do_Terminal(self, request):
        session = self._paired()
        session.terminal_size = max(1, request["columns"]), max(1, request["lines"])
        session.has_colours = request["colours"]

    def _do_Outcome(self, request):
        return {"outcome": self._paired().describe_outcome()}


# === 13. Server ==============================================================
# One daemon thread waits at the listeners and at a wake-up socket; it polls nothing. What has come
# in is a member: an Admission while it has to prove itself, then a Session or a
# ControlConnection, each with a thread of its own; all have start, close and forget. `start` is a
# transaction: bind every socket first, touch what belongs to the process last, unwind all on
# failure. `stop` undoes it in reverse and may be called twice, and by atexit.
#
#     the server's thread     _accept_one: Door.check_peer
#       Refused                 -> closed, and on record (Door.refuse)
#       needs a proof, or TLS   -> Admission, a thread: shake_hands, ask_token
#                                    Refused -> closed, and on record
#                                    else    -> take
#       else                    -> take: a Session or a ControlConnection begins, and is a member
#     each member's thread    at its end: `ended`
#     a forked child          Registry._let_go: all members forget; nobody has to be told

class Server:
    """A running server: see `start`. Usable as a context manager, which stops it."""

    def __init__(self, namespace, door, console_class=None, banner=None, loop=None,
                 run_coroutine=None, max_sessions=MAX_SESSIONS, idle_timeout_s=None):
        self.namespace = namespace
        self.door = door
        self.console_class = console_class
        self.loop = loop          # the asyncio loop for `await`; None: a session's own
        self.run_coroutine = run_coroutine        # for another framework's; None: asyncio
        self.max_sessions = max_sessions
        self.idle_timeout_s = idle_timeout_s      # of a session that waits for input, or None
        # Below "REPL session N connected."; "" or whole lines.
        self.banner = _default_banner() if banner is None else banner
        if self.banner and not self.banner.endswith("\n"):
            self.banner += "\n"
        self.address = None       # of the REPL channel, as bound: (host, port), or a path
        self.control_address = None
        self.on_stop = None       # called at the end of stop()
        self.error = None         # of what the program died; written by keep_error
        self._lock = threading.RLock()
        self._members = []        # the oldest first; guarded by _lock, as is all below
        self._last_number = 0     # of a session
        self._is_stopped = False  # stop() has begun
        self._is_halting = False  # stop when the last session is gone
        self._is_short = False    # of descriptors; written by the server's thread
        self._sockets = []        # what a forked child has to close
        self._undo = ExitStack()  # what open() did, for stop()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.stop()

    def __repr__(self):
        state = "stopped" if self._is_stopped else "%d sessions" % len(self.sessions())
        return "<hotrepl server at %s: %s>" % (_join_address(self.address), state)

    def open(self, bind, port, control_port, unix=None):
        """Bind, listen and go; for `start`. Raises what that raises, with all undone."""
        with ExitStack() as undo:
            listeners = [entered(undo, each)
                         for each in _listeners(bind, port, control_port, unix, self.door)]
            names = [each.getsockname() for each in listeners]
            self.address, self.control_address = [
                name if isinstance(name, str) else name[:2] for name in names]
            self.door.check_bind(*{each if isinstance(each, str) else each[0] for each in names})
            # Closed is not enough: a child that was forked just now holds them as well.
            for each in listeners:
                undo.callback(shut_down, each)
            token = self.door.token_for_file()
            if unix is None and token is not None:
                undo.callback(remove_made, *write_private(token_path(self.address), token))
            try:
                undo.callback(remove_made, *_write_note(self))
            except OSError as exc:
                # There is no folder to write to. The server can be reached nevertheless.
                log.debug("no note of the server at %s: %s", _join_address(self.address), exc)
            self._begin_accepting(undo, listeners)
            for enter, leave, *what in ((MAIN.acquire, MAIN.release),
                                        (GUESTS.enter, GUESTS.leave, self.namespace),
                                        (REGISTRY.add, REGISTRY.remove, self)):
                enter(*what)
                undo.callback(leave, *what)
            self._undo = undo.pop_all()

    def stop(self):
        """Close all sessions and listeners and put the process back as it was before `start`.

        Waits up to STOP_TIMEOUT_S for the threads of sessions and its own. Any thread may call it,
        a session's too; again is harmless.
        """
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
            members = [(each, getattr(each, "evaluator", each)) for each in self._members]
        self._undo.close()
        own = [each for each, thread in members if thread is threading.current_thread()]
        for each, _ in members:
            if each not in own:
                each.close()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for _, thread in members:
            _join(thread, deadline - time.monotonic())
        # A handler of the program's for the log may raise.
        with suppress(Exception):
            self.door.write_left_out()
        if self.on_stop is not None:
            self.on_stop()
        # Last, as it ends what runs in this thread.
        for each in own:
            each.close()

    def halt(self):
        """Stop once the last session is gone."""
        self._is_halting = True

    def keep_error(self, exc):
        """Let pdb.pm() in every session stand where the program died of `exc`."""
        with self._lock:
            self.error = exc
            for session in self.sessions():
                session.error = exc

    def sessions(self):
        """Return the open Sessions."""
        with self._lock:
            return [each for each in self._members if isinstance(each, Session)]

    def find_session(self, number):
        """Return the open Session of that number, or None."""
        return next((each for each in self.sessions() if each.number == number), None)

    def proofs(self):
        """Return what passes for the token on the control channel now: a proof of each session."""
        return [each.proof for each in self.sessions()]

    def take(self, channel, sock, peer, received=b""):
        """Begin what a connection is for, now that it may come in; `received` came already."""
        self.door.audit("accepted", channel=channel, peer=peer)
        if channel == "control":
            return self._start(self._enter(ControlConnection(self, sock, peer, received)))
        with self._lock:
            if len(self.sessions()) >= self.max_sessions:
                # Nothing was sent there before: there is room, so that this does not block.
                with suppress(OSError):
                    sock.sendall(b"hotrepl: no more than %d sessions are let in at once\n"
                                 % self.max_sessions, NO_SIGNAL)
                    shut_down(sock, socket.SHUT_WR)
                raise Refused("%d sessions are open, which is max_sessions" % self.max_sessions,
                              peer)
            self._last_number += 1
            session = self._enter(
                Session(self, self._last_number, Connection(sock, received), peer))
        self._start(session)

    def ended(self, member):
        """Forget a session, an admission or a control connection; called by its thread."""
        with self._lock:
            self._members.remove(member)
            is_last = self._is_halting and not self.sessions()
        try:
            if isinstance(member, Session):
                self.door.audit("end", session=member.number, peer=member.peer)
        finally:
            if is_last:
                self.stop()

    def forget(self):
        """In a forked child: close our copies of the sockets and leave; the parent's go on."""
        self._lock = threading.RLock()
        self._is_stopped = True
        for each in self._sockets:
            # Closed, and no more: the files of unix sockets are the parent's.
            each.close()
        for each in self._members:
            each.forget()
        GUESTS.leave(self.namespace, is_copy=True)

    def _begin_accepting(self, undo, listeners):
        """Start the server's thread; `undo`, an ExitStack, ends it and closes what it uses."""
        netlink = None
        with suppress(OSError):
            # Without it, check_peer() finds another way.
            netlink = entered(undo, open_netlink())
        waker, woken = [entered(undo, OwnSocket.adopt(each)) for each in socket.socketpair()]
        self._sockets = [each for each in (waker, woken, netlink, *listeners) if each is not None]
        channels = dict(zip([*listeners, woken], ("repl", "control", None)))
        thread = threading.Thread(target=self._accept, args=(channels, netlink),
                                  name="hotrepl server", daemon=True)
        thread.start()
        undo.callback(_join, thread)
        undo.callback(self._wake, waker)

    def _wake(self, waker):
        """End the server's thread."""
        self._is_stopped = True
        if waker.is_own():
            waker.send(b"!")

    def _accept(self, channels, netlink):
        """The server's thread: let in who comes, until the server stops."""
        # What to do once nobody has come for so long; start() is to return before all of it.
        ahead = [(0.001, note_program), (LOADING_DELAY_S, load_library)]
        while not self._is_stopped:
            found = wait_for(channels, timeout_s=ahead[0][0] if ahead else None)
            if not found:
                # What it raises the next session finds too, and tells its client.
                with suppress(Exception):
                    ahead.pop(0)[1]()
            for each in found:
                if not each.is_own():
                    return log.warning("the program has closed the sockets of the server at %s",
                                       _join_address(self.address))
                try:
                    if channels[each] is not None:
                        self._accept_one(each, channels[each], netlink)
                except BaseException:
                    # Of a handler for the log, say. Without this thread nobody could come in.
                    with suppress(BaseException):
                        sys.excepthook(*sys.exc_info())

    def _accept_one(self, listener, channel, netlink):
        """Let in one connection, or close it and have the reason on record."""
        sock = None
        try:
            # Else each question to the kernel may cost 5 ms.
            with SHORT_TURNS:
                sock, _ = listener.accept()
                peer = self.door.check_peer(sock, netlink)
                sock.setblocking(True)
            if peer.needs_token or self.door.ssl_context is not None:
                self._admit(channel, sock, peer)
            else:
                self.take(channel, sock, peer)
            self._is_short = False
        except Refused as exc:
            sock.close()
            self.door.refuse(exc.peer, str(exc), channel=channel)
        except BaseException as exc:
            if sock is not None:
                sock.close()
            if getattr(exc, "errno", None) in OUT_OF_DESCRIPTORS:
                # The listener stays readable: without a pause this would spin. The warning comes
                # last: a handler for the log may raise.
                time.sleep(0.2)
                is_told, self._is_short = self._is_short, True
                if not is_told:
                    log.warning("can't accept connections for a while: %s", exc)
            elif sock is not None:
                log.warning("a connection was dropped: %s", exc)

    def _admit(self, channel, sock, peer):
        """Have `peer` prove itself in a thread of its own.

        Where ADMISSION_LIMIT are at it already, one of them makes room: the oldest of the host that
        has the most.
        """
        admission = Admission(self, channel, sock, peer)
        with self._lock:
            rivals = [each for each in self._members
                      if isinstance(each, Admission) and each.is_pending]
        if len(rivals) >= ADMISSION_LIMIT:
            hosts = [each.peer.host for each in rivals]
            max(rivals, key=lambda each: hosts.count(each.peer.host)).refuse(
                "it took long while %d others came" % ADMISSION_LIMIT)
        self._start(self._enter(admission))

    def _enter(self, member):
        """Make `member` known to stop() before it is started; RuntimeError: too late."""
        with self._lock:
            if self._is_stopped:
                raise RuntimeError("the server is stopping")
            self._members.append(member)
            return member

    def _start(self, member):
        """Start a member that was entered, or forget it."""
        try:
            member.start()
        except BaseException:
            # There are no more threads, or an audit hook forbids it.
            self.ended(member)
            member.forget()
            raise


def _join(thread, timeout_s=STOP_TIMEOUT_S):
    """Wait for the end of a thread, unless that is the one that calls."""
    if thread is not None and thread is not threading.current_thread():
        thread.join(max(timeout_s, 0.0))


def start(locals=None, bind=DEFAULT_BIND, port=None, control_port=None, banner=None, console=None,
          unix=None, allow_uids=(), token=None, insecure=False, ssl_context=None, loop=None,
          run_coroutine=None, allow_names=None, max_sessions=MAX_SESSIONS, idle_timeout_s=None):
    """Serve REPL sessions over the dict `locals` from now on; return the Server.

    `locals` is the namespace of every session: `globals()` to work inside the calling module,
    {} (or None) for one of their own. The ports are 1337 and 8128, or free ones where those are
    taken; one that is given and taken is an OSError, 0 picks a free one. `console` is a class with
    InteractiveConsole's interface. `await` at the prompt runs on the asyncio `loop`; without, on
    the one that runs where this is called; else on one of the session's own. For another
    framework, `run_coroutine(coroutine)` blocks and returns the result; it is called in a thread
    of its own. Does not block; any thread may call it, but main_thread() needs that it was the
    main one; all threads it makes are daemons. TypeError: `locals` is no dict. OSError: an address
    can't be bound. After an error the process is as if this had not been called.

    Connections come in from processes of our uid and of `allow_uids`, by a unix socket of root too.
    Who can't be known, from other machines above all, must have the `token`: True makes one, which
    lies in the file token_path(server.address). `ssl_context` makes both channels TLS; with
    CERT_REQUIRED a client certificate does as well as a token. ValueError: `bind` can be reached
    from other machines, and none of these guards it; `insecure=True` lets in everybody. `unix`, a
    path, takes the place of `bind` and the ports: the control channel is beside it, PATH.control.

    More than `max_sessions` at once are refused, and one that has waited `idle_timeout_s` for input
    is ended; both are told why. Where the environment has HOTREPL_DISABLE=1 nothing is opened, and
    the Server is one that is stopped.
    """
    namespace = {"__doc__": None} if locals is None else locals
    if not isinstance(namespace, dict):
        raise TypeError("locals is %s, expected a dict such as globals()" % shorten(locals))
    if loop is None and "asyncio" in sys.modules:
        loop = sys.modules["asyncio"]._get_running_loop()
    _use_real_threads()
    door = Door(allow_uids, token, insecure, ssl_context, allow_names)
    server = Server(namespace, door, console, banner, loop, run_coroutine, max_sessions,
                    idle_timeout_s)
    if os.environ.get("HOTREPL_DISABLE", "0") not in ("", "0"):
        log.warning("HOTREPL_DISABLE is set: no server is started")
        server.stop()
    else:
        server.open(bind, port, control_port, unix)
    return server


def _use_real_threads():
    """Where gevent has patched the standard library, make this module anew, without the patches.

    As a greenlet a session would hold up the whole program while it evaluates, so that nobody
    could interrupt it. Only before the first server; the program's modules stay as they are.
    """
    is_patched = not isinstance(threading.get_ident, types.BuiltinFunctionType)
    if is_patched and __name__ != "__main__" and not REGISTRY.all():
        patched = {name: sys.modules.pop(name) for name in _PATCHED if name in sys.modules}
        try:
            exec(__loader__.get_code(__name__), globals())  # type: ignore[name-defined]
        finally:
            sys.modules.update(patched)


_PATCHED = ("_thread", "threading", "queue", "select", "selectors", "socket", "time")


class Admission(threading.Thread):
    """A connection that has to prove itself, by TLS or the token, before it is taken.

    A TLS connection keeps the thread, which then carries its bytes.
    """

    def __init__(self, server, channel, sock, peer):
        super().__init__(name="hotrepl admission", daemon=True)
        self.server = server
        self.channel = channel
        context = server.door.ssl_context
        self.sock = sock if context is None else context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False)
        self.peer = peer
        self._decision = threading.Lock()         # whoever gets it decides, once
        self._reason = None       # a text: it was refused from outside; "": we are stopping

    @property
    def is_pending(self):
        """Whether it has neither proved itself nor been refused."""
        return not self._decision.locked()

    def run(self):
        """Ask for the proof, then hand over; the Door has a refusal on record."""
        door = self.server.door
        # A send through TLS can't be told NO_SIGNAL.
        _hold_sigpipe(True)
        try:
            if door.ssl_context is not None:
                door.shake_hands(self.sock, self.peer)
            received = b""
            if self.peer.needs_token:
                is_control = self.channel == "control"
                proofs = self.server.proofs if is_control else tuple
                received = door.ask_token(self.sock, self.peer, is_control, proofs)
            if not self._decision.acquire(False):
                raise Refused(self._reason, self.peer)
            self._hand_over(received)
        except Refused as exc:
            self.sock.close()
            reason = str(exc) if self._reason is None else self._reason
            if reason:
                door.refuse(self.peer, reason, channel=self.channel)
        except (OSError, ValueError, RuntimeError) as exc:
            # The peer is gone, or the server is stopping.
            self.sock.close()
            log.debug("connection of %s dropped: %s", self.peer, exc)
        except BaseException:
            # Of a handler for the log.
            self.sock.close()
            raise
        finally:
            self.server.ended(self)

    def close(self):
        """End the connection, from any thread, where it is not another's by now."""
        self.refuse("")
        if self.server.door.ssl_context is not None:
            shut_down(self.sock)

    def refuse(self, reason):
        """End the connection, from any thread, if it has not proved itself by now."""
        self._reason = reason
        if self._decision.acquire(False):
            shut_down(self.sock)
            self.peer.over.set()

    def forget(self):
        """In a forked child: close our copy of the socket, which leaves the parent's alone."""
        socket.socket.close(self.sock)

    def _hand_over(self, received):
        """Have the server take the connection, or with TLS one end of a pair.

        Between the other end of that pair and the TLS connection this thread carries the bytes.
        """
        # The session's thread inherits the mask, and so do its children.
        _hold_sigpipe(False)
        if self.server.door.ssl_context is None:
            return self.server.take(self.channel, self.sock, self.peer, received)
        inner, outer = map(OwnSocket.adopt, socket.socketpair())
        try:
            self.server.take(self.channel, outer, self.peer, received)
        except BaseException:
            outer.close()
            raise
        finally:
            # A client that is refused is told why, through TLS.
            _hold_sigpipe(True)
            carry(self.sock, inner)


def _hold_sigpipe(is_held):
    """Block SIGPIPE in the calling thread, or let it in again.

    While it is blocked, a send to a peer that is gone fails by an error.
    """
    if hasattr(signal, "pthread_sigmask"):
        how = signal.SIG_BLOCK if is_held else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, [signal.SIGPIPE])


def stop():
    """Stop every server that this copy of hotrepl runs in this process."""
    session = current_session()
    for server in sorted(REGISTRY.all(), key=lambda each: session in each.sessions()):
        server.stop()


class Registry(Installed):
    """The servers of this process, and what they need of it: atexit and fork."""

    def __init__(self):
        super().__init__()
        self._servers = []        # those that run
        self._is_hooked = False   # fork handlers can't be taken out again

    def add(self, server):
        """Enter a server that runs."""
        self._servers.append(server)
        self.acquire()

    def remove(self, server):
        """Take out a server that stops."""
        self._servers.remove(server)
        self.release()

    def all(self):
        """Return the servers that run."""
        return list(self._servers)

    def _install(self):
        atexit.register(stop)
        if not self._is_hooked:
            self._is_hooked = True
            at_fork(self._let_go, _pause_loading, _go_on_loading)

    def _uninstall(self):
        atexit.unregister(stop)

    def _let_go(self):
        """In a forked child: no server is here, nothing of ours, and none of our threads."""
        servers, self._servers = self._servers, []
        for server in servers:
            server.forget()
        _go_on_loading()
        FLUSHER.forget()
        for each in self.ALL:
            each.forget()


def _pause_loading():
    """Before a fork: wait for imports of ours, which a child could never end.

    Not for ever: the import may wait for the very thread that forks.
    """
    LOADING.acquire(True, STOP_TIMEOUT_S)


def _go_on_loading():
    """After a fork, in both processes."""
    with suppress(RuntimeError):
        LOADING.release()


def at_fork(in_child, before=int, in_parent=int):
    """Have these called at each fork from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent,  # novm
                            after_in_child=in_child)
    elif hasattr(os, "fork"):
        # 3.6 has no such hook, so os.fork itself gets one.
        def fork(original=os.fork):
            before()
            pid = original()
            (in_parent if pid else in_child)()
            return pid
        os.fork = fork


def _listeners(bind, port, control_port, unix, door):
    """Yield the socket of the REPL channel, and then that of the control channel, as contexts."""
    if unix is None:
        yield _listen(bind, port, "port", DEFAULT_PORT)
        yield _listen(bind, control_port, "control_port", DEFAULT_CONTROL_PORT)
    else:
        path = os.path.abspath(os.fsdecode(unix))
        yield unix_listener(path, door.token_for_file())
        yield unix_listener(path + CONTROL_SUFFIX)


def _listen(bind, port, parameter, default):
    """Return a socket that listens; an OSError says what to do.

    Where `port` is None at `default`, or at a free one if that is taken.
    """
    if port is None:
        try:
            return _listen(bind, default, parameter, default)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
        sock = _listen(bind, 0, parameter, default)
        log.warning("port %d is in use, took %d as %s", default, sock.getsockname()[1], parameter)
        return sock
    if not isinstance(port, int) or not 0 <= port <= 65535:
        raise ValueError("%s is %r, expected a number from 0 to 65535" % (parameter, port))
    host = bind
    # For a str getaddrinfo() imports encodings.idna, which takes long.
    with suppress(AttributeError, UnicodeEncodeError):
        host = bind.encode("ascii")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as exc:
        raise OSError(exc.errno, "%r is no address to bind: %s" % (bind, exc.strerror)) from exc
    sock = OwnSocket(family, kind, proto)
    try:
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        # A listener hands its options on to what it accepts.
        _tune(sock)
        sock.listen(BACKLOG)
    except OSError as exc:
        sock.close()
        raise type(exc)(exc.errno, "port %d is in use; pass %s=0 to pick a free one, or stop the "
                        "program that holds it" % (port, parameter)
                        if exc.errno == errno.EADDRINUSE else
                        "can't listen on %s port %d: %s" % (bind, port, exc.strerror)) from exc
    sock.setblocking(False)
    return sock


def _write_note(server):
    """Let the client find `server` by a note in the runtime folder; see `_read_note`.

    Return what `remove_made` takes.
    """
    places = map(_join_address, (server.address, server.control_address))
    note = [os.getpid(), process_mark(os.getpid()), time.time(), namespaces(), *places,
            *getattr(sys, "argv", [])]
    name = NOTE_NAME % (os.getpid(), os.urandom(4).hex())
    return write_private(os.path.join(runtime_folder(), name),
                         "\0".join(map(str, note)).encode("utf-8", "surrogatepass"))


# Gone after two minutes. No TCP_USER_TIMEOUT: it would end a client that was stopped for a while.
KEEPALIVE = [("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)]


def _tune(sock):
    """Send at once (no Nagle), keep little on its way, and notice a peer whose machine is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # What is in there no Ctrl+C can take back.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    for name, value in KEEPALIVE:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _join_address(address):
    """Return an address as text: a path, or HOST:PORT."""
    if not isinstance(address, tuple):
        return str(address)
    host, port = address
    return "%s:%s" % ("[%s]" % host if ":" in host else host, port)


def _default_banner():
    """Return the line below "REPL session N connected."; at most 79 characters."""
    pypy = " (PyPy %d.%d.%d)" % sys.pypy_version_info[:3] if IS_PYPY else ""
    return "Python %s%s, hotrepl %s. doc() lists tools, obj? explains, exit() leaves." % (
        sys.version.split()[0], pypy, __version__)


REGISTRY = Registry()


# === 14. Client ==============================================================
# A terminal at one end, two sockets at the other, and one thread between them. Link: both
# sockets. Terminal: what a person sees and types. Conversation: which event means what; its
# table says it all.
#
# How a line travels. The server says what it waits for, sends its prompt and go-ahead; Link
# makes events of that; Conversation has Terminal read a line behind the prompt, and sends it,
# or the lines of a paste as one block; then it shows what comes until the next go-ahead. While
# readline edits, it asks `Terminal._next_key` for keys, which waits for them and for the sockets.
#
# How a Ctrl+C travels. The terminal drops what was typed before it and sends SIGINT. At a
# prompt the handler ends the line, and an interrupt goes where the line would have gone, on the
# REPL channel. At work it is a request on the control channel, with the number of the turn, so
# that it hits nothing later. What was typed behind Ctrl+C waits in the terminal for its prompt.
# A handler never sends a request itself: `Link.post` puts it down and wakes whoever waits.
#
# How a connection comes about. `open_channels`: the way there (`_reach`, by ssh `tunnel`), the REPL
# channel (`dial`, which asks the kernel whose server that is), the token if it is asked for, then
# the control channel that the server names (`Link.meet`). All but the last are section 10's.
#
# What is done to the terminal is undone: by `kept_modes` around each line that is read, a secret
# one too, and around the whole; and by Terminal's ExitStack (signals, readline's hooks, pastes).
# What comes in between, in the main thread too: the handlers of SIGINT, SIGTSTP and SIGWINCH, at
# any line; and readline, which is C, calls `Terminal._next_key` while a line is edited.

class ServerGone(Exception):
    """The server closed the connection, or does not answer."""


class Left(Exception):
    """The user forced the end of the client."""


BACKSPACES = b"\b", b"\x7f"       # what a terminal may send for that key
PASTE_PAUSE_S = 0.01              # what comes sooner after a line than this was pasted with it
HALF_LINE_S = 0.02                # a line whose end does not come for so long is shown
STUCK_AFTER_S = 1.0               # an evaluation that ignores Ctrl+C for so long is stuck
HASTE_S = 3.0                     # who answers a question so fast by Ctrl+C wants to leave it
PROMPT_LIMIT_BYTES = 400          # more is text: readline writes past its memory at 256 rows
KEPT_EVENTS, KEPT_BYTES = 100, 4 << 20    # of what came and is not shown yet; then the server waits


# --- Link: both sockets ---

class Link:
    """A session with a server: bytes and requests out, events in. For the main thread.

    `events` holds (kind, bytes), as they came:
        "kind"     what the turn will be for; "turn": it is there, the server waits
        "stream"   of which kind the data is from here on
        "data"     what was printed, and the prompt
        "closed"   the last one
    What is no part of the text stands aside: `notes` and `is_ended`.
    """

    BLOCKS = {NOTE_KIND: "note", TURN_KIND: "kind", CONTROL_KIND: "control"}

    def __init__(self, sock, deadline=None):
        self.sock = sock          # the REPL channel
        self.control = None       # the control channel, once `meet` had the server name it
        self.deadline = deadline  # for all answers together; None: ANSWER_LIMIT_S for each
        self.events = collections.deque()
        self.notes = collections.deque()      # bytes to be shown at once
        self.is_ended = False     # the server says that the session ended as the user wanted
        self.is_closed = False    # the server closed the REPL channel
        self.loss = ""            # why there is no control channel any more
        self._named = None        # what the server says of its control channel, once it did
        self._marks = MarkDecoder()
        self._messages = MessageDecoder()
        self._woken, self._wake = socket.socketpair()     # a byte for each `wake`
        self._unsent = collections.deque()    # (request, what takes its reply); also from handlers
        self._text = collections.deque()  # what is to be sent on the REPL channel; as well
        self._owed = collections.deque()  # what takes the replies that are still to come, in order
        for each in (self._woken, self._wake):
            each.setblocking(False)

    def meet(self, call_control, is_known=False, streams=False):
        """Have the server name its control channel, connect by `call_control(port)`, and pair.

        The second connection goes where the first says, and never carries the token: where one
        was shown (`is_known`), it shows a proof. From then on the server marks its turns, and with
        `streams` its streams. ServerGone, ProtocolError or OSError: this fails.
        """
        # By this the server knows that both channels are ours.
        secret = os.urandom(16).hex()
        self.sock.setblocking(False)
        self.send(BEGIN + SECRET_KIND + secret.encode("ascii") + END + BEGIN + CONTROL_KIND + END)
        number, address = self._receive_hello()
        found = re.match(rb"(\d{1,5}) ([\w-]{16,99})\Z", address)
        if not found or int(found.group(1)) > 65535:
            _gone("it names no control channel: %s" % shorten(address))
        self.control = call_control(int(found.group(1)))
        if is_known:
            self.ask("Authenticate", proof=found.group(2).decode("ascii"))
        self.ask("PairWithSession", id=number, secret=secret)
        self.ask("TurnMarks", kinds=True, streams=streams)

    def _receive_hello(self):
        """Return the session's number, and what is said of the control channel, once both came."""
        match, end = None, self.deadline or time.monotonic() + ANSWER_LIMIT_S
        while not (match and self._named is not None):
            self.wait(time_left_s(end))
            text = b"".join(data for kind, data in self.events if kind == "data")
            match = re.match(rb"REPL session (\d{1,9}) connected\.\r?\n", text)
            is_other = b"\n" in text or self._named is not None or len(text) > RECEIVE_BYTES
            if not match and is_other:
                _gone("its first line is %s, expected 'REPL session N connected.'"
                      % shorten(text.partition(b"\n")[0]))
            if self.is_closed:
                _gone("it closed the connection at once")
        return int(match.group(1)), self._named

    def close(self):
        """Close both connections."""
        for each in (self.sock, self.control, self._woken, self._wake):
            if each is not None:
                each.close()

    def send(self, data):
        """Have `wait` send bytes on the REPL channel; a signal's handler may call it."""
        self._text.append(memoryview(data))
        self.wake()

    def post(self, command, use=lambda reply: None, **fields):
        """Have `wait` send a request, and call `use` with its reply, {} where there is none.

        A signal's handler may call it.
        """
        self._unsent.append((encode_message(dict(fields, command=command)), use))
        self.wake()

    def wake(self):
        """Have `wait` return; also from a signal's handler."""
        with suppress(OSError):
            # So many wakes were not seen yet that none is needed.
            self._wake.send(b"!")

    @contextmanager
    def signals(self, **handlers):
        """Have signals call `handlers`, and end `wait`, also those that come just before it blocks.

        Signals are the main thread's; another goes on without them.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [(getattr(signal, name), signal.signal(getattr(signal, name), handler))
                  for name, handler in handlers.items() if hasattr(signal, name)]
        descriptor = signal.set_wakeup_fd(self._wake.fileno())
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before:
                signal.signal(number, handler)

    def ask(self, command, limit_s=None, **fields):
        """Return the reply to a request. ProtocolError: it is refused. ServerGone: none came."""
        replies, end = [], time.monotonic() + (limit_s or time_left_s(self.deadline))
        self.post(command, replies.append, **fields)
        while not replies and time.monotonic() < end:
            self.wait(max(0.0, end - time.monotonic()))
        if not (replies and replies[0]):
            if not self.loss:
                time_left_s(self.deadline)
            raise ServerGone(self.loss or "no answer on the control connection")
        if replies[0].get("status") != "ok":
            raise ProtocolError(shorten(printable(str(
                replies[0].get("reason", "refused without a reason")).replace("\n", " ")), 300))
        return replies[0]

    def until_turn(self, take, pause):
        """Have `take(kind, bytes)` what comes until the server waits for us; return for what.

        "": it closed the connection. `pause(is_quiet)` does what is due before we wait, and says
        how long that may take, None: for ever; `is_quiet`: while we waited last nothing came.
        """
        word, is_quiet = "primary", False
        while True:
            for kind, data in take_all(self.events):
                if kind in ("turn", "closed"):
                    return word if kind == "turn" else ""
                if kind == "kind":
                    word = data.decode("ascii", "replace")
                take(kind, data)
            self.wait(pause(is_quiet))
            is_quiet = not self.events

    def wait(self, timeout_s=None):
        """Send what is to be sent, and take in what comes within that time, or until `wake`."""
        self._send_requests()
        unsent = [self.sock] if self._text and not self.is_closed else []
        ready, is_free, _ = select.select(self.sockets(), unsent, [], timeout_s)
        if is_free:
            self._send_text()
        if self._woken in ready:
            self._woken.recv(RECEIVE_BYTES)
        if self.sock in ready:
            self._receive()
        if self.control in ready:
            self._receive_replies()

    def sockets(self):
        """Return those that `wait` has to look after."""
        watched = [self._woken]
        if not self.is_closed and not self._is_full():
            watched.append(self.sock)
        if self.control is not None and not self.loss:
            watched.append(self.control)
        return watched

    def _is_full(self):
        """Return whether so much has come and is not shown that the server has to wait."""
        kept = [data for _, data in self.events] + list(self.notes)
        return len(kept) > KEPT_EVENTS or sum(map(len, kept)) > KEPT_BYTES

    def _send_text(self):
        """Send of the REPL channel's text what the socket takes now."""
        data = self._text.popleft()
        try:
            data = data[self.sock.send(data):]
        except OSError as exc:
            # It is gone, which the next event tells; or it takes nothing just now.
            data = data if isinstance(exc, BlockingIOError) else b""
        if data:
            self._text.appendleft(data)

    def _receive(self):
        """Take in what has come on the REPL channel: as events, or where it stands aside."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        for kind, payload in self._marks.feed(data):
            if kind == "block" and payload[:1] in self.BLOCKS:
                kind, payload = self.BLOCKS[payload[:1]], payload[1:]
            if kind == "note":
                self.notes.append(payload)
            elif kind == "eof":
                self.is_ended = True
            elif kind == "control":
                self._named = payload
            else:
                self.events.append(("stream" if kind == "block" else kind, payload))
        if not data:
            self.is_closed = True
            self.events.append(("closed", b""))

    def _send_requests(self):
        """Send what was posted; each request is owed a reply then, in this order."""
        for request, use in take_all(self._unsent):
            self._owed.append(use)
            try:
                self.control.settimeout(time_left_s(self.deadline))
                self.control.sendall(request)
            except OSError as exc:
                self._give_up(exc)

    def _receive_replies(self):
        """Take in what has come on the control channel, each reply for the oldest request."""
        try:
            data = self.control.recv(RECEIVE_BYTES) or _gone("the control connection was closed")
            for reply in self._messages.feed(data):
                self._owed.popleft()(reply if isinstance(reply, dict) else {})
        except (OSError, ServerGone, ProtocolError, IndexError) as exc:
            self._give_up(exc)

    def _give_up(self, why):
        """Do without the control channel from now on: whoever waits for a reply gets {}."""
        self.loss = self.loss or str(why)
        self.control.close()
        for use in take_all(self._owed):
            use({})


def _gone(why):
    """Raise ServerGone, where only an expression can stand."""
    raise ServerGone(why)


# --- Conversation: which event means what ---

class Conversation:
    """One session with a server, as a person at a terminal has it.

    What happens at an event (rows: where it is). A turn is answered by what comes first, a line or
    Ctrl+C; an append to `_answers` is one step, which no signal's handler can cut in two.

              output     go-ahead  line or ^D   Ctrl+C              Ctrl+Z      1 s later  closed
    --------  ---------  --------  -----------  ------------------  ----------  ---------  ------
    at work   show       asked     -            request; urged      background  -          exit 1
    urged     show       asked     -            request             background  explain    exit 1
    in vain   show       asked     -            exit 0              background  -          exit 1
    flooded   show       asked     -            request; dropping   background  -          exit 1
    dropping  -          asked     -            request             background  explain    exit 1
    asked     (waits)    -         send         interrupt; urged    stop us     -          exit 1
    leaving   show       exit 0    -            exit 0              background  -          exit 0

    "asked" is at work once it is answered, or leaving after Ctrl+D at the primary prompt. A note
    is shown at once: between lines, or above the one that is edited. "explain" asks the server
    what it does, and says so; output still on its way: flooded. Where no answer comes, or none
    has helped for ANSWER_LIMIT_S, it is in vain: we say that Ctrl+C leaves, and it does, with 0,
    also where the server asks again and again. So none can keep us, whatever it sends.
    """

    def __init__(self, link):
        self.link = link
        self.terminal = Terminal(self)
        self._state = "at work"   # as in the table; "asked" is: nothing in _answers
        self._answers = [b""]     # to the last turn; the first counts
        self._turn = 0            # how many go-aheads came
        self._explain_at = None   # when what was interrupted and goes on is explained
        self._is_heard = True     # the last request about that was answered
        # When Ctrl+C, or Ctrl+D at a question, was first pressed since the last prompt or line.
        self._pressed_at = None
        self._ahead = collections.deque()     # lines of a paste, for the waits that follow
        self._block = []          # the lines of the statement that is being typed
        self._is_loss_told = False    # that of the control connection

    def run(self):
        """Talk until the user leaves or the server is gone; return the exit code."""
        with self.terminal:
            try:
                self.terminal.describe_to(self.link.ask)
                self.terminal.begin()
                while True:
                    kind = self.link.until_turn(self._show, self._pause)
                    self._show_notes()
                    if not kind:
                        self.terminal.end_line()
                        _gone("it closed the connection")
                    self._answer(kind)
            except Left:
                # The shell's prompt is not to stand behind ^C.
                if self._state != "leaving":
                    with suppress(Left):
                        self.terminal.write(b"\n")
                return 0
            except (ProtocolError, ServerGone) as exc:
                if self._state == "leaving" or self.link.is_ended:
                    return 0
                say("the server is gone: %s" % exc)
                return 1

    def _show(self, kind, data):
        """Take an event that is no turn: text is shown, unless it is to be dropped."""
        if kind == "kind" and self._state not in ("leaving", "in vain"):
            # The prompt comes next.
            self._state = "at work"
        elif kind == "data" and self._state != "dropping":
            self.terminal.show(data)

    def _pause(self, is_quiet):
        """Do what is due before the link waits; return how long it may, None: for ever."""
        if is_quiet:
            self.terminal.show_held()
        if self._explain_at is not None and time.monotonic() >= self._explain_at:
            self._ask_why()
        self._show_notes()
        if self.terminal.held:
            return HALF_LINE_S
        return self._explain_at and max(0.0, self._explain_at - time.monotonic())

    def _ask_why(self):
        """Find out why Ctrl+C had no effect yet."""
        if self._is_heard:
            self._request("Where", self._explain)
            self._explain_at = time.monotonic() + STUCK_AFTER_S
        else:
            self._let_leave("this can't be interrupted any more" if self.link.loss else
                            "no answer from the server: the process is stopped or very busy")

    def _let_leave(self, why):
        """Say why nothing more can be done; the next Ctrl+C leaves."""
        self._state, self._explain_at = "in vain", None
        self._say("%s; Ctrl+C again leaves, the process goes on" % why)

    def _is_in_vain(self):
        """Return whether the user has tried for long to end what the server does."""
        return (self._pressed_at is not None
                and time.monotonic() - self._pressed_at > ANSWER_LIMIT_S)

    def _explain(self, reply):
        """Say what the server does, and what Ctrl+C or Ctrl+Z would do now."""
        self._on_heard(reply)
        if not reply or not self._answers or self._state in ("leaving", "in vain"):
            return
        if self._is_in_vain():
            return self._let_leave("no prompt in %d seconds" % ANSWER_LIMIT_S)
        if self._state != "urged":
            return
        self._explain_at = None
        sending = reply.get("sending")
        if reply.get("where") and not sending:
            return self._say("no reaction yet: %s; a call in C has to return first. "
                             "Ctrl+Z puts it into the background." % reply["where"])
        self._state, how_much = "flooded", ""
        if isinstance(sending, list) and [type(each) for each in sending] == [int, int]:
            how_much = ", %d of %d MB" % tuple(each // 1000000 for each in sending)
        self._say("still sending its output%s; Ctrl+C again drops the rest" % how_much)

    def _answer(self, kind):
        """Send what the user answers to a turn for `kind`."""
        self.terminal.expect()
        # From here on it is "asked"; first of all, see on_interrupt.
        self._answers = []
        self._turn += 1
        if self._state == "leaving":
            raise Left
        self._state, self._explain_at = "at work", None
        if kind != "continuation":
            self._block = []
        if kind in AT_PROMPT:
            self._pressed_at = None
        if self._is_in_vain():
            self._let_leave("it asks again and again")
            self._show_notes()
        begun = time.monotonic()
        data = self._read(kind, self.terminal.take_prompt())
        ended = time.monotonic()
        if data not in (b"", END_OF_FILE):
            self._pressed_at = None
            if self._state == "in vain":
                self._state = "at work"
        elif self._pressed_at is None or ended - begun > HASTE_S:
            # Who thinks before Ctrl+C is in no haste.
            self._pressed_at = ended
        self._answers.append(data)
        if self._answers[0] is data:
            if data == END_OF_FILE and kind in AT_PROMPT:
                self._state = "leaving"
            self.link.send(data)

    def _read(self, kind, prompt):
        """Return what the user answers, as bytes for the server."""
        if self._ahead and kind != "secret":
            text = self._ahead.popleft()
            self.terminal.write((prompt + text + "\n").encode("utf-8", "surrogateescape"))
        else:
            try:
                is_more = kind == "continuation" and self._block
                indent = _indentation(self._block) if is_more else ""
                text = self.terminal.read(prompt, indent, is_secret=kind == "secret")
            except (EOFError, KeyboardInterrupt) as exc:
                if self._state == "in vain":
                    raise Left from exc
                return END_OF_FILE if isinstance(exc, EOFError) else b""
        if kind in AT_PROMPT:
            # An empty line has no indentation.
            text = text if text.strip() else ""
            self._block += text.split("\n")
            if text:
                self.terminal.remember("\n".join(self._block), kind == "continuation")
        else:
            text, *more = text.rstrip("\n").split("\n")
            self._ahead.extend(more)
            if kind == "debugger":
                self.terminal.remember(text, is_saved=False)
        data = text.encode("utf-8", "surrogateescape").replace(IAC, b"")
        return BEGIN + BLOCK_KIND + data + END if b"\n" in data else data + b"\n"

    # What the terminal calls, in the main thread.

    def on_ready(self):
        """While a line is edited: take in what came; ServerGone ends it."""
        # Events are for later: there may be another's interrupt in between.
        self.link.wait(0.0)
        if self.link.is_closed:
            raise ServerGone("it closed the connection")
        self._show_notes()

    def on_interrupt(self):
        """Deal with Ctrl+C, pressed however often; return whether it answers what is asked.

        A signal's handler.
        """
        if self._state == "leaving" or self._state == "in vain" and self._answers:
            # The next press finds us on the way out.
            self._state = "at work"
            raise Left
        self._ahead.clear()
        # An object of its own: the next press may come at any line here.
        press = bytes(bytearray(INTERRUPT))
        self._answers.append(press)
        is_answer = self._answers[0] is press
        if is_answer:
            self.link.send(INTERRUPT)
        elif self._turn:
            self._request("KeyboardInterrupt", self._on_heard, turn=self._turn, answered=True)
        if self._state != "in vain":
            self._state = "dropping" if self._state in ("flooded", "dropping") else "urged"
        now = time.monotonic()
        # The first press counts.
        self._explain_at = self._explain_at or now + STUCK_AFTER_S
        self._pressed_at = self._pressed_at or now
        return is_answer

    def on_suspend(self):
        """Deal with Ctrl+Z at work; a signal's handler."""
        self.link.post("Background", turn=self._turn)

    def complete(self, line):
        """Return (start, matches, hint), as Complete's reply has them; without one no matches."""
        try:
            reply = self.link.ask("Complete", limit_s=2 * COMPLETION_TIMEOUT_S, line=line,
                                  cursor=len(line))
            start, matches, hint = (reply.get(name) for name in ("start", "matches", "hint"))
            if type(start) is int and isinstance(matches, list) and isinstance(hint or "", str):
                return start, matches, hint
            _gone("its reply to Complete makes no sense")
        except (ProtocolError, ServerGone) as exc:
            if self.link.loss:
                self._tell_loss()
            else:
                self._say("no completions: %s" % exc)
            self._show_notes()
        return 0, [], None

    def _request(self, command, use, **fields):
        """Send a request by which we see whether the server still hears us."""
        self._is_heard = False
        self.link.post(command, use, **fields)

    def _on_heard(self, reply):
        """Take the reply to such a request, {} where the control channel is lost."""
        self._is_heard = bool(reply)
        if reply and self._state == "in vain" and not self._is_in_vain():
            # The server was only busy.
            self._state, self._explain_at = "urged", time.monotonic()
        if not reply:
            self._tell_loss()
            # One that answered a prompt went another way: the next prompt is about to come.
            if self._state == "urged" and self._answers[:1] != [INTERRUPT]:
                self._explain_at = time.monotonic()

    def _tell_loss(self):
        """Say once that the control channel is lost."""
        if not self._is_loss_told and not self.link.is_closed:
            self._is_loss_told = True
            self._say("the control connection is lost, and with it Tab and interrupts: %s"
                      % self.link.loss)

    def _say(self, text):
        """Have a line of ours shown, as soon as notes are."""
        self.link.notes.append(("\nhotrepl: %s\n" % printable(text)).encode("utf-8", "replace"))

    def _show_notes(self):
        """Show the server's notes, and lines of ours."""
        if self.link.notes:
            self.terminal.show_note(b"".join(take_all(self.link.notes)))


def _indentation(block):
    """Return what the next line of a statement begins with, after the lines `block`."""
    import tokenize
    # The row where the last logical line begins, and whether the next token begins another.
    row, is_new = len(block), True
    lines = iter([line + "\n" for line in block] + [""])
    try:
        for kind, _, (start, _), _, _ in tokenize.generate_tokens(lines.__next__):
            if kind == tokenize.NEWLINE:
                is_new = True
            elif is_new and kind in (tokenize.NAME, tokenize.OP, tokenize.STRING, tokenize.NUMBER):
                row, is_new = start, False
    except (tokenize.TokenError, SyntaxError, StopIteration) as exc:
        if "string" in str(exc):
            # The lines of a long string are the user's.
            return ""
        # Within brackets.
        row = len(block)
    first, last = (block[at - 1] for at in (row, len(block)))
    indent, last = first[:len(first) - len(first.lstrip())], last.partition("#")[0].rstrip()
    if last.endswith((":", "(", "[", "{")):
        return indent + "    "
    is_end = re.match(r"\s*(return|raise|pass|break|continue)\b", first)
    return indent[:-4] if is_end else indent


# --- Terminal: what a person sees and types ---

class Terminal:
    """What a person sees and types. A context manager: afterwards all is as it was before.

    The client waits for a person in `_next_bytes` alone, there for signals and sockets too. GNU
    readline asks it for each key, by its own hook; so does PyPy's editor, by its console. Where
    there is neither, and for a secret, the terminal edits the line, and we get it whole. Only
    libedit's, Windows' and a pipe's input() wait by themselves: nothing but Ctrl+C ends that.
    """

    def __init__(self, owner):
        self.owner = owner        # a Conversation, for its on_... methods
        self._undo = ExitStack()  # what is put back at the end
        self._modes = None        # of the terminal, before we were there
        # How a line is read: by one of the _read_... methods.
        self._edit = self._read_cooked if _has_modes() else self._read_alone
        self._history = None      # a _History where there is readline
        self._library = None      # the C library of GNU readline, where that can be had
        self._give_key = None     # what it calls, to be kept
        self._is_reading = False  # a line is read; `_next_bytes` or input() waits
        self._ending = None       # the exception that ends the reading
        self._prompt = ""         # of the line that is read
        self._is_secret = False   # which is not to be shown
        self._typed = b""         # what was read and belongs to the next line
        self._is_typed_ahead = False  # the next key was typed before its line was begun
        self._line = b""          # the end of what is shown since the last newline, ...
        self.held = b""          # ... and what has come behind it
        self._is_line_open = False    # Ctrl+C ended a line there: what comes next begins a new one
        self._takes_pastes = False    # a paste of several lines is read as one string
        self._marks_pastes = False    # the terminal can be told to mark where one begins and ends

    def __enter__(self):
        self._modes = entered(self._undo, kept_modes())
        # Before it is shown that we are connected: from then on a user may press Ctrl+C.
        entered(self._undo, self.owner.link.signals(
            SIGINT=self._on_interrupt, SIGTSTP=self._on_suspend, SIGWINCH=self._on_resize))
        return self

    def __exit__(self, *exc_info):
        self._undo.close()

    def describe_to(self, send):
        """Have `send`, a method of the Link, tell the server what terminal this is."""
        import shutil
        if sys.stdout.isatty():
            columns, lines = shutil.get_terminal_size()
            has_colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
            send("Terminal", columns=columns, lines=lines, colours=has_colours)

    # Output.

    def write(self, data):
        """Write bytes. A terminal that is gone is the end of the client."""
        try:
            if hasattr(sys.stdout, "buffer"):
                sys.stdout.buffer.write(data)
            else:
                # That of IDLE or of a notebook.
                sys.stdout.write(data.decode("utf-8", "replace"))
            sys.stdout.flush()
        except (OSError, ValueError) as exc:
            raise Left from exc

    def show(self, data):
        """Write the lines that come, and hold back a last one that is begun: it may be a prompt."""
        head, newline, self.held = (self.held + data).rpartition(b"\n")
        self._show_now(head + newline)
        if len(self.held) > PROMPT_LIMIT_BYTES:
            self.show_held()

    def show_held(self):
        """Write what is held back: its end does not come."""
        held, self.held = self.held, b""
        self._show_now(held)

    def _show_now(self, data):
        if data and self._is_line_open and not data.startswith(b"\n"):
            data = b"\n" + data
        if data:
            self._is_line_open = False
            self.write(data)
            line = (self._line + data).rpartition(b"\n")[2]
            self._line = line[-PROMPT_LIMIT_BYTES - 1:]

    def end_line(self):
        """Begin a new line, if one is begun."""
        self.show_held()
        if self._line or self._is_line_open:
            self.write(b"\n")
        self._line, self._is_line_open = b"", False

    def expect(self):
        """Forget a Ctrl+C of before: from here on one ends what is read next."""
        self._ending = None

    def take_prompt(self):
        """Return what came since the last newline, for `read` to write: the prompt.

        Where the line is long already, the prompt begins another. Bytes that are no text are left
        out: as text each would become three.
        """
        prompt, self.held = self.held, b""
        if self._is_line_open or len(self._line + prompt) > PROMPT_LIMIT_BYTES:
            self.end_line()
        if self._line:
            # The prompt is written again.
            self.write(b"\r")
        line, self._line = self._line + prompt, b""
        return line.rpartition(b"\r")[2].decode("utf-8", "ignore")

    def show_note(self, data):
        """Write lines above the one that is edited, or before what comes next."""
        if self._is_reading:
            is_erased = self._call("rl_clear_visible_line", ("fflush", None))
            return self.show_above(data, b"" if is_erased else b"\r\033[K")
        if self._line and not data.startswith(b"\n"):
            data = b"\n" + data
        self.write(data + self._line)

    def show_above(self, data, begin=b"\n"):
        """Write lines above the one that is edited, and that line again."""
        # The terminal may be raw.
        self.write((begin + data).replace(b"\n", b"\r\n"))
        if self._call("rl_on_new_line", "rl_redisplay"):
            return
        line = b""
        with suppress(Exception):
            # There is no readline, or it is PyPy's on a terminal that it can't use.
            line = b"" if self._is_secret else _line_buffer()
        self.write(self._prompt.encode("utf-8", "surrogateescape") + line)

    def _show_tall(self, text):
        """Show a block that fills the screen again: readline leaves out the lines in its middle."""
        import shutil
        columns, lines = shutil.get_terminal_size()
        # 3.6 has 0 where the terminal was told no size.
        columns = columns or 80
        if sum(1 + len(line) // columns for line in text.split("\n")) > lines > 1:
            self.write(("\033[H\033[J%s\n" % text).encode("utf-8", "surrogateescape"))

    # Input.

    def read(self, prompt, begun="", is_secret=False):
        """Return what is typed behind `prompt`: a line, or several of a paste.

        EOFError after Ctrl+D, KeyboardInterrupt after Ctrl+C, and what `owner.on_ready` raises.
        """
        self._prompt, self._is_secret = prompt, is_secret
        edit = self._edit
        if is_secret:
            self._mark_pastes(False)
            edit = self._read_cooked if _has_modes() else self._read_alone
        try:
            # Once more than the readers do it: Ctrl+C can be raised while one puts them back.
            with kept_modes():
                self._is_reading = True
                text = edit(prompt, begun)
                if not (is_secret or self._takes_pastes or edit == self._read_alone):
                    text += self._rest_of_paste()
            if self._ending is not None:
                raise self._ending
        except KeyboardInterrupt:
            self._is_line_open = True
            raise
        except (EOFError, ServerGone):
            self.write(b"\n")
            raise
        finally:
            self._is_reading = False
            # So what is pasted before the next prompt is one unit too.
            self._mark_pastes(True)
        if not is_secret:
            self._show_tall((prompt + text).rstrip("\n"))
        return text

    def remember(self, text, is_longer=False, is_saved=True):
        """Keep what was typed at a prompt, as _History.add does."""
        if self._history is not None:
            self._history.add(text, is_longer, is_saved)

    def _read_gnu(self, prompt, begun):
        """Return what is typed into GNU readline, which calls `_give_key`."""
        import ctypes
        import readline
        readline.set_startup_hook((lambda: readline.insert_text(begun)) if begun else None)
        try:
            line = self._library.readline(_hide_escapes(prompt).encode("utf-8", "surrogateescape"))
        finally:
            readline.set_startup_hook(None)
        text = ctypes.string_at(line) if line else b""
        # Its own function: free() here may be that of another library.
        self._library.rl_free(ctypes.c_void_p(line))
        return text.decode("utf-8", "surrogateescape")

    def _read_pypy(self, prompt, begun):
        """Return what is typed into PyPy's line editor, which draws key by key what is begun."""
        # It keeps the NUL that Linux makes of a Ctrl+D typed ahead.
        return input(_hide_escapes(prompt)).replace("\0", "")

    def _read_cooked(self, prompt, begun):
        """Return a line as the terminal itself has it edited; as getpass, where it is secret."""
        import termios
        if self._is_secret:
            modes = termios.tcgetattr(0)
            modes[3] &= ~termios.ECHO
            termios.tcsetattr(0, termios.TCSADRAIN, modes)
        self.write(prompt.encode("utf-8", "surrogateescape"))
        line = b""
        while b"\n" not in line and self._ending is None:
            # Of an Enter that was typed before the terminal edited, it is a CR.
            line += self._next_bytes(RECEIVE_BYTES, misses=1).replace(b"\r", b"\n")
            if line.startswith(CTRL_D):
                self._ending, self._typed = EOFError(), line[1:]
        if self._ending is not None:
            return ""
        if self._is_secret:
            self.write(b"\n")
        line, _, self._typed = line.partition(b"\n")
        return line.decode("utf-8", "surrogateescape")

    def _read_alone(self, prompt, begun):
        """Return a line from a reader that waits by itself; Ctrl+C raises an exception in it."""
        import getpass
        if self._ending is not None:
            raise self._ending
        if sys.stdin is None:
            # It was closed before we began.
            raise EOFError
        return getpass.getpass(prompt) if self._is_secret else input(_hide_escapes(prompt))

    def _next_bytes(self, count, misses=5):
        """Return what is typed; b"": `_ending` says why nothing comes.

        Nothing to read where select() says there is, so often in a row, means that the terminal is
        gone: once it may be that Ctrl+Z has dropped it.
        """
        data, self._typed = self._typed[:count], self._typed[count:]
        try:
            while not data and self._ending is None:
                ready = select.select([0] + self.owner.link.sockets(), [], [])[0]
                if ready != [0]:
                    self.owner.on_ready()
                # Ctrl+C drops what was typed, also between these two lines.
                if 0 in ready and self._ending is None:
                    data = os.read(0, count)
                    misses -= 0 if data else 1
                if misses == 0:
                    self._ending = EOFError()
        except BaseException as exc:
            # Our caller can be readline, which is C.
            self._ending = exc
        # Ctrl+C right after a read: what was read is in all likelihood what it is to drop.
        return data if self._ending is None else b""

    def _next_key(self):
        """Return the next byte that is typed into a line editor; b"": `_ending` says why none."""
        try:
            if read_without_waiting():
                # The line begins.
                self._is_typed_ahead = bool(self._typed or select.select([0], [], [], 0)[0])
        except Exception:
            # termios.error: the terminal is gone. Our caller can be readline, which is C.
            self._ending = EOFError()
        key = self._next_bytes(1)
        if key == b"\0" and self._is_typed_ahead:
            # Linux makes a NUL of a Ctrl+D that was typed in the other mode.
            key = CTRL_D
        self._is_typed_ahead = False
        if key == CTRL_D and not _line_buffer().strip():
            self._ending, key = EOFError(), b""
        if key in BACKSPACES and re.match(rb"(    )+\Z", _line_buffer()):
            # It takes back a step of the indentation.
            self._typed = key * 3 + self._typed
        return key

    def _rest_of_paste(self):
        """Return the lines that come right behind the one just read; what is begun is kept.

        For terminals that do not mark a paste. The lines are echoed here.
        """
        read_without_waiting()
        data = self._typed
        while self._ending is None and select.select([0], [], [], PASTE_PAUSE_S)[0]:
            piece = os.read(0, RECEIVE_BYTES)
            if not piece:
                break
            data += piece
        # A NUL was a Ctrl+D, see _next_key.
        data = data.replace(b"\r", b"\n").replace(b"\0", CTRL_D)
        lines, newline, self._typed = data.rpartition(b"\n")
        self.write(lines + newline)
        return (newline + lines).decode("utf-8", "surrogateescape")

    def _mark_pastes(self, is_on):
        """Tell the terminal, where it understands that, whether to mark what is pasted."""
        if self._marks_pastes:
            with suppress(Left):
                self.write(b"\033[?2004h" if is_on else b"\033[?2004l")

    # Signals.

    def _on_interrupt(self, signum, frame):
        """SIGINT's handler: what was typed before Ctrl+C is dropped, and a line ends that is read.
        """
        self._typed = b""
        if self.owner.on_interrupt():
            self._ending = KeyboardInterrupt()
            if self._is_reading and self._edit == self._read_alone:
                raise self._ending

    def _on_resize(self, signum, frame):
        """SIGWINCH's handler: tell the server and readline of the new size."""
        self.describe_to(self.owner.link.post)
        if self._is_reading:
            self._call("rl_resize_terminal")

    def _on_suspend(self, signum, frame):
        """SIGTSTP's handler. While a line is edited: stop, as any program does on Ctrl+Z.

        The terminal is in readline's mode then, which not every shell takes back and gives again:
        so both are done here, and afterwards the line is shown again.
        """
        if not self._is_reading:
            return self.owner.on_suspend()
        import termios
        if self._is_secret:
            # Else what follows us reads it, and shows it.
            termios.tcflush(0, termios.TCIFLUSH)
        with kept_modes():
            termios.tcsetattr(0, termios.TCSADRAIN, self._modes)
            before = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            self._mark_pastes(False)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTSTP)
            signal.signal(signal.SIGTSTP, before)
        # The shell has told the terminal to mark no pastes.
        self._mark_pastes(True)
        self.show_above(b"", begin=b"")

    # The line editors.

    def begin(self):
        """Set up readline, and have it ask us for keys; both until the end."""
        try:
            import readline
        except ImportError:
            return
        self._undo.callback(readline.set_completer, readline.get_completer())
        self._undo.callback(readline.set_completer_delims, readline.get_completer_delims())
        self._undo.callback(self._mark_pastes, False)
        self._history = _History(readline)
        readline.set_completer(_RemoteCompleter(self, readline).complete)
        # The word is the whole line: any replacement fits.
        readline.set_completer_delims("")
        is_terminal = _has_modes() and os.isatty(1)
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
            self._edit = self._read_alone
        elif IS_PYPY and is_terminal:
            self._feed_pypy()
        elif not IS_PYPY:
            for setting in ("tab: complete", "set enable-bracketed-paste on",
                            "set show-all-if-ambiguous on"):
                readline.parse_and_bind(setting)
            self._takes_pastes = getattr(readline, "_READLINE_VERSION", 0) >= 0x0700
            self._marks_pastes = (self._takes_pastes and is_terminal
                                  and os.environ.get("TERM") != "dumb")
            self._edit = self._read_alone
            if is_terminal:
                self._feed_gnu(readline)

    def _feed_gnu(self, readline):
        """Have GNU readline ask us for keys, where its C library can be had."""
        try:
            import ctypes
            library = ctypes.CDLL(readline.__file__)
            source = ctypes.c_void_p.in_dll(library, "rl_getc_function")
            library.readline.restype, library.rl_free.restype = ctypes.c_void_p, None
        except (ImportError, AttributeError, OSError, ValueError):
            # Some builds of Python have it otherwise.
            return
        self._give_key = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._key_for_gnu)
        self._undo.callback(setattr, source, "value", source.value)
        source.value = ctypes.cast(self._give_key, ctypes.c_void_p).value
        self._library, self._edit = library, self._read_gnu
        # As Python's input() has it.
        self._variable("rl_catch_signals").value = 0

    def _key_for_gnu(self, stream):
        """Return a key's code, as GNU readline's rl_getc_function; without one it ends the line."""
        key = self._next_key()
        if key:
            return key[0]
        done = self._variable("rl_done")
        was_done, done.value = done.value, 1
        # -1 in the middle of a paste, which ends so.
        return -1 if was_done else 0

    def _feed_pypy(self):
        """Have PyPy's line editor ask us for keys, where it can use the terminal."""
        try:
            console = sys.modules["pyrepl.readline"]._wrapper.get_reader().console
        except Exception:
            # It has a way of its own for such a terminal.
            return
        events = console.event_queue

        def get_event(block=True):
            while events.empty():
                key = self._next_key()
                if not key:
                    raise self._ending
                events.push(key)
            return events.get()
        console.get_event = get_event
        self._undo.callback(vars(console).pop, "get_event")
        # PyPy 8 has pastes marked, and drops all but their first line.
        console._UnixConsole__enable_bracketed_paste = lambda: None
        self._edit = self._read_pypy

    def _variable(self, name):
        """Return a variable of GNU readline's, an int in C."""
        import ctypes
        return ctypes.c_int.in_dll(self._library, name)

    def _call(self, *calls):
        """Call functions of GNU readline, names or (name, argument); False: it edits no line."""
        if self._library is None or self._is_secret:
            return False
        for call in calls:
            name, *arguments = (call,) if isinstance(call, str) else call
            if hasattr(self._library, name):
                # An old one lacks some.
                getattr(self._library, name)(*arguments)
        return True


def _has_modes():
    """Return whether stdin is a terminal whose modes can be set."""
    return os.name == "posix" and os.isatty(0)


@contextmanager
def kept_modes():
    """Yield the terminal's modes, None where it has none; afterwards they are as before.

    Around each line that is read, and around the whole conversation: so getpass, which turns the
    echo off, leaves no trace, whatever ends it.
    """
    if not _has_modes():
        yield None
        return
    import termios
    before = termios.tcgetattr(0)
    try:
        yield before
    finally:
        if termios.tcgetattr(0) != before:
            termios.tcsetattr(0, termios.TCSANOW, before)


def _line_buffer():
    """Return the line that is being edited, as bytes."""
    line = sys.modules["readline"].get_line_buffer()
    # PyPy has bytes.
    return line if isinstance(line, bytes) else line.encode("utf-8", "replace")


def read_without_waiting():
    """Set the terminal so that a read returns at once, with what was typed or nothing.

    Return whether it was otherwise before. A line editor has set it up nearly so. But Ctrl+C, which
    drops what was typed, can come between our look and our read, which would then wait. And Ctrl+C
    is to be a signal; PyPy 7 would have it as a key.
    """
    import termios
    before, modes = termios.tcgetattr(0), termios.tcgetattr(0)
    modes[3] = modes[3] & ~(termios.ICANON | termios.ECHO) | termios.ISIG
    modes[6][termios.VMIN] = modes[6][termios.VTIME] = 0
    if modes != before:
        termios.tcsetattr(0, termios.TCSANOW, modes)
    return modes != before


# --- The way in, completion, history ---

def connect(host="127.0.0.1", port=DEFAULT_PORT, control_port=None, ssl_context=None,
            token=None, is_plain=False):
    """Run the client in this terminal against a server; return an exit code, 0 or 1.

    `host` can also be "unix:PATH", and "ssh://USER@HOST[:PORT]" or "USER@HOST" for a server on a
    machine that is reached with ssh; there "ssh://.../PATH" means a unix socket. `token` is sent
    where the server asks for one. Nothing is sent to a server of another user, or whose that is
    can't be known, but with TLS, ssh or `is_plain`. Blocks until the user leaves. Belongs in the
    main thread, which Ctrl+C needs. OSError with what to do: nobody listens there, or lets us in.
    """
    with open_channels(host, port, control_port, ssl_context, token, is_plain) as link:
        return Conversation(link).run()


@contextmanager
def open_channels(host, port, control_port, ssl_context=None, token=None, is_plain=False,
                  deadline=None, streams=False):
    """Yield a Link to a server that has let us in; the way is told in the section's head.

    OSError: it does not let us in, does not answer, or may be another user's.
    """
    way = _reach(host, port, control_port, deadline)
    with way as (address, locate_control, confirm), ExitStack() as undo:
        sock, owner = dial(address, ssl_context, is_plain, deadline)
        link = Link(sock, deadline)
        undo.callback(link.close)
        whose = confirm()
        is_ours = owner == effective_uid() and tell_far_owner(host, whose)
        is_trusted = is_ours or owner is None or ssl_context is not None

        def call_control(port):
            control, other = dial(locate_control(port), ssl_context, is_plain, deadline,
                                  is_roots=owner == 0)
            # What root's process has accepted is that of whom it has become meanwhile.
            if other not in (owner, 0) and (ssl_context is not None or server_owner(sock) != other):
                control.close()
                raise PermissionError(errno.EACCES, "the control port is another user's than the "
                                      "REPL port, so nothing was sent there")
            return control

        def confirm_owner():
            # It has spoken, so it has accepted; till then it may have been another's who listened.
            is_same = ssl_context is not None or server_owner(sock, owner) == owner
            if not is_same or confirm() != whose:
                raise PermissionError(errno.EACCES, "the server is another user's by now, or "
                                      "nobody's, so nothing was sent")
        hint = ", or it wants --tls" if ssl_context is None else ""
        try:
            tokens = tokens_to_show(address, token, is_ours, is_trusted)
            shown = show_token(sock, confirm_owner, tokens, deadline, hint)
            link.meet(call_control, shown is not None, streams)
        except socket.timeout as exc:
            if deadline is not None:
                raise
            raise ConnectionError(
                errno.ETIMEDOUT, "no answer in %d seconds: the process is stopped or busy, or this "
                "is not its REPL port%s" % (ANSWER_LIMIT_S, hint)) from exc
        except (ServerGone, ProtocolError) as exc:
            raise ConnectionError(errno.EPROTO, "the server is gone: %s" % exc) from exc
        yield link


@contextmanager
def _reach(host, port, control_port, deadline):
    """Keep up what leads to a server; yield its address, and two functions.

    The first returns the control channel's address for its port there. The second, called once we
    are connected, returns whose the server at a far end is, as `far_owner` does.
    """
    if host.startswith("unix:"):
        path = host[len("unix:"):]
        yield path, lambda named: path + CONTROL_SUFFIX, str
    elif host.startswith("ssh://") or "@" in host:
        forwarded = control_port or DEFAULT_CONTROL_PORT
        with tunnel(host, port, forwarded, deadline) as (path, confirm):
            yield path, lambda named: path + CONTROL_SUFFIX if named in (0, forwarded) else _gone(
                "its control port is %d; pass --control-port %d" % (named, named)), confirm
    else:
        yield (host, port), lambda named: (host, control_port or named), str


class _RemoteCompleter:
    """Readline's completer: one request for the whole list, at state 0."""

    SHOWN = 200                   # of the words that could stand at the cursor

    def __init__(self, terminal, readline):
        self._terminal = terminal
        self._start = 0           # where in the line the replaced word begins
        self._matches = []
        if hasattr(readline, "set_completion_display_matches_hook"):
            readline.set_completion_display_matches_hook(self._display)

    def complete(self, text, state):
        if state == 0:
            self._matches = self._fetch(text)
        return self._matches[state] if state < len(self._matches) else None

    def _fetch(self, line):
        """Return the lines that the completions make of `line`; a hint is shown above it."""
        if not line.strip():
            return [line + "    "]
        self._start, matches, hint = self._terminal.owner.complete(line)
        if hint:
            self._terminal.show_above(("%s\n" % printable(hint)).encode())
        return [line[:self._start] + match for match in matches
                if isinstance(match, str) and match.isprintable()]

    def _display(self, substitution, matches, longest):
        """List what could stand at the cursor: the words, not the whole lines."""
        import shutil
        words = [match[self._start:] for match in matches[:self.SHOWN]]
        width = max(map(len, words)) + 2
        per_line = max(1, shutil.get_terminal_size().columns // width)
        rows = ["".join(word.ljust(width) for word in words[index:index + per_line]).rstrip()
                for index in range(0, len(words), per_line)]
        if len(matches) > self.SHOWN:
            rows.append("... and %d more" % (len(matches) - self.SHOWN))
        self._terminal.show_above(("\n".join(rows) + "\n").encode())


class _History:
    """The lines typed at prompts, kept across sessions in one private file: JSON, an entry a line.

    HOTREPL_HISTORY names another file; empty: none. Answers to input() are not kept, and commands
    to a debugger only till the end. A statement is saved line by line, each time longer: a
    terminal that is closed ends us without a word.
    """

    LIMIT = 2000                  # entries that are read back

    def __init__(self, readline):
        self._readline = readline
        path = os.path.expanduser(os.environ.get("HOTREPL_HISTORY", "~/.hotrepl_history"))
        self._path = "" if path.startswith("~") else path     # "~": nobody knows our home
        self._last = ""           # the entry of this session that was added last
        self._is_ours = hasattr(readline, "set_auto_history")     # else input() adds each line
        if self._is_ours:
            readline.set_auto_history(False)
        for entry in self._read():
            self._offer(entry)

    def add(self, entry, is_longer, is_saved):
        """Remember what was typed at a prompt, unless it is blank or was the last one too.

        `is_longer`: the last was its beginning, and is there no longer. `is_saved`: in the file.
        """
        import json
        entry = entry.rstrip("\n")
        if not entry.strip() or self._last == entry:
            return
        self._last = entry
        if self._path and is_saved:
            with suppress(OSError), self._open(os.O_WRONLY | os.O_CREAT | os.O_APPEND, "a") as file:
                file.write(json.dumps(entry) + "\n")
        if self._is_ours:
            with suppress(Exception):
                if is_longer:
                    at = self._readline.get_current_history_length() - 1
                    self._readline.remove_history_item(at)
            self._offer(entry)

    def _offer(self, entry):
        """Give readline an entry, for the up arrow, if it takes it."""
        # LC_ALL=C: Python reads UTF-8, readline can't keep it; PyPy's has errors of its own.
        with suppress(Exception):
            self._readline.add_history(entry)

    def _open(self, flags, mode):
        """Open the file, which is for our eyes only from now on, even if it was not."""
        descriptor = open_own(self._path, flags)
        if os.name == "posix":
            # The file may be an older one, or a copy.
            with suppress(OSError):
                # A disk may have no modes, or be there to read only.
                os.fchmod(descriptor, 0o600)
        return open(descriptor, mode, encoding="utf-8")

    def _read(self):
        """Return the last entries of the file, without those that only begin the next one."""
        import json
        try:
            with self._open(os.O_RDONLY, "r") as file:
                entries = [str(json.loads(line)) for line in collections.deque(file, self.LIMIT)]
        except (OSError, ValueError, RecursionError):
            return []
        return [entry for entry, later in zip(entries, entries[1:] + [""])
                if not later.startswith(entry + "\n")]


def _hide_escapes(prompt):
    """Tell readline which parts of a prompt have no width (its manual, \\001 and \\002)."""
    return re.sub(r"(\x1b\[[0-9;?]*[A-Za-z])", "\001\\1\002", prompt)


# === 15. Command line ========================================================
# argv -> exit code. What is said to people goes to stderr, as "hotrepl: ..."; stdout is for what
# the code prints, and for `list`. Exit codes: 0; 1 for what failed, 2 for wrong use; 130, 124.
#
#   serve    make __main__ look as Python makes it, start a server over it, run the program there
#   connect  find the server (`_find_server`: a PID, an address, the only one), open a Conversation
#   exec     find one or all, hold an Execution with each; one piece of code, or --stream's requests
#   list     the notes that servers leave in the runtime folder, see `noted_servers`
#
# A new option is a line of _OPTIONS: argparse and --help have it from there. Each subcommand is a
# function of the parsed options that returns the exit code; a ValueError that it raises is the
# user's mistake (2), an OSError what could not be done (1). All runs in the main thread. What exec
# needs stands in a room of its own at the end.

def main(argv=None):
    """Run the command line `argv`; return the exit code: 0, 1 for bind and connect, 2 for usage."""
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    if any(re.match("-.", word) for word in rest) or rest and not hasattr(options, "words"):
        parser.error("unrecognized arguments: " + " ".join(rest))
    elif rest:
        # argparse does not take words on both sides of an option.
        options.words += rest
    try:
        return options.run(options)
    except OSError as exc:
        say(exc.strerror or str(exc))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except ValueError as exc:
        say(str(exc))
        return 2


def make_parser():
    """Return argparse's parser, made of _SUBCOMMANDS and _OPTIONS."""
    import argparse
    # Without a width argparse imports shutil, bz2, lzma and more.
    columns = os.environ.get("COLUMNS", "")
    style = functools.partial(argparse.RawDescriptionHelpFormatter,
                              width=int(columns) - 2 if columns.isdigit() else 78)
    parser = argparse.ArgumentParser(
        prog="hotrepl.py", formatter_class=style,
        description="Talk to a running Python process, and change it.", epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version="hotrepl " + __version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    # 3.6 has no such argument.
    commands.required = True
    by_name = {}
    for name, run, usage, purpose, description in _SUBCOMMANDS:
        by_name[name] = commands.add_parser(
            name, help=purpose, usage="%(prog)s " + usage, description=description,
            formatter_class=style)
        by_name[name].set_defaults(run=run)
    serve, client, execute = by_name["serve"], by_name["connect"], by_name["exec"]
    serve.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE ARG",
                       help="run a module or package, as python -m does")
    serve.add_argument("script", nargs=argparse.REMAINDER, metavar="SCRIPT ARG",
                       help="run a script, as python does; what follows it are its own arguments")
    serve.set_defaults(bind=DEFAULT_BIND)
    client.add_argument("host", nargs="?", metavar="HOST", help=_HOST_HELP)
    execute.add_argument("words", nargs="*", metavar="HOST, FILE", help=_HOST_HELP + "; without "
                         "-c the last word is the FILE with the code, - for what comes in on stdin")
    execute.add_argument("-c", dest="codes", action="append", metavar="CODE",
                         help="the code itself")
    for names, option, metavar, text in re.findall(
            r"(?m)^(\S+) (--[\w-]+) ?(\S*): (.*)$", re.sub(r"\n +", " ", _OPTIONS)):
        facts = {"metavar": metavar, "type": {"N": int, "SECONDS": _seconds}.get(metavar, str)}
        for name in names.split(","):
            by_name[name].add_argument(option, help=text, **facts if metavar else {
                "action": "store_true"})
    return parser


_OPTIONS = """\
serve --keep: stay when the program has ended, for whoever connects
serve --bind ADDRESS: the address to listen on (default: 127.0.0.1)
serve --unix PATH: listen on the unix sockets PATH and PATH.control instead
serve --token: let in who has a token that is made now, where uids can't be known
serve --insecure: let in everybody
exec,list --json: print JSON objects, one a line
exec --timeout SECONDS: interrupt the code after this time, and exit with 124
exec --module MODULE: the code is from this module's file: run it there, patch what it defines
  (default: the module of --file)
exec --file F: the file it is from (default: FILE)
exec --line N: the line where CODE begins; without -c: take the definition around line N of FILE
exec --stream: with --json -: run the requests that come on stdin, one a line
exec --max-chars N: with --json: cut texts that are longer
exec --all: run it in every server of the list
exec --match TEXT: run it in every server whose command in the list contains TEXT
connect,exec --token-file FILE: holds the server's token
connect,exec --tls: encrypt; verify the server's name
connect,exec --plain: send all in clear text, to whoever's server it is
connect,exec --cafile FILE: --tls, and who may sign for the server
connect,exec --cert FILE: --tls, and our certificate and key
serve --port N: the REPL port to listen on; 0: a free one (default: 1337, or a free one)
serve --control-port N: the control port to listen on; 0: a free one (default: 8128, or a free one)
connect,exec --port N: the REPL port to connect to (default: what is noted, else 1337)
connect,exec --control-port N: the control port, where it is not the one that the server names, or
  for ssh not 8128"""

_EXAMPLES = """\
  hotrepl.py serve --keep train.py       run a script with a server in it
  hotrepl.py connect                     a prompt in the running process
  hotrepl.py exec -c 'len(cache)'        run code there, for a program or a build script
  hotrepl.py exec --all fix.py           in every process of the list

A program has a server too after `import hotrepl; hotrepl.start(globals())`.
Each COMMAND has its own --help."""

_SERVE_HELP = """\
Run a program, unmodified, with a server over its globals, and exit as it does. Without a
program: serve an empty namespace until Ctrl+C. Options come before the program.

  serve train.py --lr 3          as `python train.py --lr 3`
  serve -m package.module ARG    as `python -m package.module ARG`
  serve --keep train.py          and stay when it has ended or died: `import pdb; pdb.pm()` at
                                 the prompt stands where it failed. Ctrl+C or SIGTERM then ends
                                 it with the exit status that it would have had."""


def _serve(options):
    """Run a program with a server in it, or a server alone; return the exit code.

    The server is there before the program's first line, in a new __main__ that the program gets.
    """
    words = (options.module or []) + options.script
    if options.module == [] and not words:
        raise ValueError("serve -m needs the name of a module; see --help")
    # pickle and others look names up in __main__.
    main_module = types.ModuleType("__main__")
    vars(main_module)["__builtins__"] = builtins
    done = threading.Event()
    # What a shell's script starts by `serve &` has SIGINT ignored: Ctrl+C is not to end that.
    ends = [number for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) != signal.SIG_IGN]
    if not words:
        _end_on_signals(done, ends)
        return _stay(_start_server(options, main_module, done), done)
    load = (_prepare_script if options.module is None else _prepare_module)(words, main_module)
    server = _start_server(options, main_module, done)
    pid = os.getpid()
    status = _run_program(load, vars(main_module), server)
    if not options.keep or os.getpid() != pid:
        # A child that the program forked is not kept.
        if sys.version_info >= (3, 12):
            # At its end Python waits for the program's threads, and lets no new one start: nobody
            # could visit them. So wait here, by the same function.
            threading._shutdown()
        # The server is stopped by atexit.
        return status
    _end_on_signals(done, ends)
    say("%s has ended with exit status %d and is kept; %s ends it"
        % (words[0], status, "Ctrl+C" if signal.SIGINT in ends else "SIGTERM"))
    return _stay(server, done, status)


def _start_server(options, main_module, done):
    """Start the server over the new __main__, and say where it is; it sets `done` when it stops."""
    sys.modules["__main__"] = main_module
    server = start(vars(main_module), options.bind, options.port, options.control_port,
                   unix=options.unix, token=options.token, insecure=options.insecure)
    server.on_stop = done.set
    if server.address is None:
        say("HOTREPL_DISABLE is set: no server is started")
        done.set()
        return server
    server.door.tell = _say_if_read
    if options.unix is None and options.port is None and server.address[1] != DEFAULT_PORT:
        say("port %d is in use, took a free one" % DEFAULT_PORT)
    say("listening on %s (REPL) and %s (control)"
        % (_join_address(server.address), _join_address(server.control_address)))
    say("connect with: python %s connect %s"
        % (os.path.basename(__file__), _host_word(server.address)))
    if server.door.token is not None:
        say("the token is in %s" % token_path(server.address))
    return server


def _stay(server, done, status=0):
    """Wait until `done` is set, by a signal or by halt(); then stop the server."""
    done.wait()
    server.stop()
    return status


def _end_on_signals(done, numbers):
    """Set `done` when this process, not a child that it forks, gets one of these signals."""
    before = {number: signal.signal(number, lambda *_: done.set()) for number in numbers}

    def restore():
        for number, handler in before.items():
            try:
                signal.signal(number, handler)
            except ValueError:
                # PyPy: the thread that forked is not the main one.
                import ctypes
                ctypes.CDLL(None).signal(int(number), 0)
        release()

    if hasattr(os, "fork"):
        # A signal for the child may come before it has these back.
        hold, release = [functools.partial(signal.pthread_sigmask, how, before)
                         for how in (signal.SIG_BLOCK, signal.SIG_UNBLOCK)]
        at_fork(restore, hold, release)


def _prepare_script(words, main_module):
    """Make the process look as `python WORDS` makes it; return what loads the script's code."""
    import importlib.machinery
    source = _read_file(words[0])
    _set_first_path(os.path.dirname(os.path.realpath(words[0])))
    sys.argv = words
    # As 3.9 and later have it: right also after a chdir().
    path = os.path.abspath(words[0])
    vars(main_module).update(__file__=path, __cached__=None,
                             __loader__=importlib.machinery.SourceFileLoader("__main__", path))
    return lambda: compile(source, path, "exec", 0, True)


def _prepare_module(words, main_module):
    """Make the process look as `python -m WORDS` makes it; return what finds the module's code."""
    import runpy
    _set_first_path(os.getcwd())
    sys.argv = words

    def load():
        # It imports the module's package, which is the program's code too.
        try:
            _, spec, code_object = runpy._get_module_details(words[0], _NoSuchModule)
        except _NoSuchModule as exc:
            raise SystemExit("hotrepl: %s" % exc) from None
        sys.argv[0] = spec.origin
        vars(main_module).update(__spec__=spec, __file__=spec.origin, __cached__=spec.cached,
                                 __loader__=spec.loader, __package__=spec.parent)
        return code_object
    return load


class _NoSuchModule(Exception):
    """runpy's word for a module that can't be run."""


def _set_first_path(folder):
    """Put `folder` where Python put ours; with -I and -P (3.11) it puts none."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = folder


def _run_program(load, namespace, server):
    """Run the code that `load` returns, in the main thread; return the exit status."""
    try:
        exec(load(), namespace)
        status = 0
    except SystemExit as exc:
        status = _exit_status(exc.code)
    except BaseException as exc:
        _hide_our_frames(exc)
        server.keep_error(exc)
        status = _show_death(exc)
    with suppress(AttributeError, OSError, ValueError):
        # There is no stdout, or it was closed.
        sys.stdout.flush()
    return status


def _exit_status(code_or_text):
    """Return the status that sys.exit(`code_or_text`) stands for, having printed a text."""
    if code_or_text is None or isinstance(code_or_text, int):
        return int(code_or_text or 0)
    with suppress(Exception):
        # Whatever its str() raises.
        print(code_or_text, file=sys.stderr or io.StringIO())
    return 1


def _hide_our_frames(exc):
    """Let the traceback of the program's exception begin with the program."""
    frames = exc.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == _serve.__code__.co_filename:
        frames = frames.tb_next
    exc.__traceback__ = frames


def _show_death(exc):
    """Do what Python does for an uncaught exception; return the exit status."""
    # On PyPy they are others once the hook has raised.
    frames = exc.__traceback__
    sys.last_type, sys.last_value, sys.last_traceback = type(exc), exc, frames
    if sys.version_info >= (3, 12):
        sys.last_exc = exc  # novm
    try:
        sys.excepthook(type(exc), exc, frames)
    except SystemExit as own:
        # Of the program's own hook.
        return _exit_status(own.code)
    except BaseException as own:
        _hide_our_frames(own)
        own.__context__ = None
        print("Error in sys.excepthook:", file=sys.stderr)
        sys.__excepthook__(type(own), own, own.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(type(exc), exc, frames)
    return 130 if isinstance(exc, KeyboardInterrupt) else 1


_HOST_HELP = ("HOST, HOST:PORT, unix:PATH, USER@HOST or ssh://USER@HOST:PORT by ssh, or "
              "the PID of a server of the list (default: the only one in the list; where that is "
              "empty, 127.0.0.1)")

_CONNECT_HELP = """\
Open a session: an interactive Python in the process of a server. exit() or Ctrl+D leaves it,
Ctrl+C interrupts what it runs, Ctrl+Z puts that into the background. Where stdin is no terminal,
its text is run as one piece of code, as by exec.

  connect                        the only server there is, else their list
  connect 4711                   the server of that process
  connect me@far.example.org     a server on a machine that is reached with ssh

Environment: HOTREPL_TOKEN is the server's token, HOTREPL_HISTORY the file for what was typed
(empty: none), NO_COLOR asks for no colours."""

_LIST_HELP = """\
Show the running servers of this user on this machine, a line each. 'connect PID' and 'exec PID'
take one of them, 'exec --all' takes all."""

_EXEC_HELP = """\
Run code in the process of a server, in a session of its own, and exit as a script would.

  exec -c 'len(cache)'           the last expression's value is shown, as at the prompt
  exec 10.0.0.5 patch.py         FILE is read here and runs there
  ... | exec 4711 -              in the server of that process
  exec --all fix.py              in every server of the list, one after the other
  exec --line 12 app.py          patch the function around line 12 of the program's app.py
  exec --json --stream -         answer many requests on one connection

The code's stdout goes to stdout and its stderr to stderr, byte for byte; input() is at its end.
With --all and --match each line begins with the server's PID, and the exit status is 1 if any
was not 0.

Exit status: 0; 1 after an exception, whose traceback goes to stderr, or if the server is gone;
the status of a SystemExit; 130 after Ctrl+C, which interrupts the code; 124 after --timeout.

With --json stdout has one object a line, in this order:
  {"stream": "stdout" or "stderr", "text": ...}   as often as something is printed
  {"stream": ..., "base64": ...}                  the same for bytes that are no UTF-8
  {"value": ...}                                  repr() of the last expression, if not None
  {"exception": {"type": ..., "message": ..., "traceback": ...}}
  {"exit": N}                                     always the last
With --all and --match each has a "pid" too, but for one more {"exit": N} at the end. A text that
was cut at --max-chars has "truncated": true beside it.

With --stream each line of stdin is a request, {"code": ..., "timeout": SECONDS, "module": ...,
"file": ..., "line": ..., "within": the class it stands in}; all but the first may lack. Each is
answered by its objects up to {"exit": N}, whatever fails."""


def _connect(options):
    """Open a session in this terminal; or, where stdin is none, run what comes on it."""
    place = _find_server(options, options.host)
    if sys.stdin is None or sys.stdin.isatty():
        return connect(*place, *_credentials(options))
    with Execution(place + _credentials(options)) as session:
        return session.run(PlainOutput(), sys.stdin.buffer.read())


def _credentials(options):
    """Return (ssl_context, token, is_plain), as `connect` takes them."""
    token = _read_token(options.token_file) if options.token_file else None
    return _tls_context(options), token, options.plain


def _tls_context(options):
    """Return the ssl.SSLContext that the options ask for, or None."""
    if not (options.tls or options.cafile or options.cert):
        return None
    import ssl
    for path in filter(None, (options.cafile, options.cert)):
        # ssl does not say which of them it can't read.
        _read_file(path)
    try:
        context = ssl.create_default_context(cafile=options.cafile)
        if options.cert:
            context.load_cert_chain(options.cert)
        return context
    except ssl.SSLError as exc:
        raise ValueError("found no PEM that fits: --cafile wants certificates, --cert a "
                         "certificate and its key") from exc


def _exec(options):
    """Check what belongs together, read the code, and have it run; return the exit code."""
    words, codes = list(options.words), options.codes or []
    path = words.pop() if words and not codes else None
    is_for_all = options.all or options.match is not None
    if not codes and path is None:
        raise ValueError("exec needs -c CODE, a FILE or -; see --help")
    if len(codes) > 1:
        raise ValueError("-c is there twice, expected one CODE, of any number of lines; see --help")
    if len(words) > (0 if is_for_all else 1):
        raise ValueError("exec takes one FILE or -c CODE, and one HOST without --all and --match; "
                         "found also %r; see --help" % words[-1])
    if options.stream and (not options.json or path != "-" or is_for_all):
        raise ValueError("--stream goes with --json and -, without --all and --match; see --help")
    source, place = b"", {}
    if not options.stream:
        # In an ASCII locale what was typed has come as surrogates.
        source = (codes[0].encode("utf-8", "surrogateescape") if codes else _read_source(path))
        source, place = _placed(options, path, source)
    if is_for_all:
        return _exec_in_all(options, source, place)
    return _exec_in(_find_server(options, words[0] if words else None), options, source, place)


def _placed(options, path, source):
    """Return (source, fields of the Place request) of code that stands in a module's file."""
    place = {name: getattr(options, name) for name in ("module", "file", "line")
             if getattr(options, name) is not None}
    if not place:
        # The file's name is for tracebacks.
        return source, {"name": os.path.basename(path)} if path not in (None, "-") else {}
    if options.file or path not in (None, "-"):
        place["file"] = os.path.abspath(options.file or path)
    if path is not None and options.line is not None:
        source, place["line"], place["within"] = _definition_at(source, options.line)
    return source, place


def _definition_at(source, line):
    """Return (source, first line, class around it) of the function or class at a line of a file."""
    import ast
    import inspect
    text, names, found = source.decode(), [], None
    try:
        nodes = ast.parse(text).body
    except SyntaxError as exc:
        raise ValueError("line %s is no Python: %s" % (exc.lineno, exc.msg)) from exc
    # What stands in the class at that line is added meanwhile.
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            first = min(each.lineno for each in [node] + node.decorator_list)
            block = inspect.getblock(text.splitlines(True)[first - 1:])
            if first <= line < first + len(block):
                found = "".join(block).encode(), first, ".".join(names)
                names.append(node.name)
                nodes += node.body if isinstance(node, ast.ClassDef) else []
    if found is None:
        raise ValueError("no function or class stands at line %d" % line)
    return found


def _exec_in(server, options, source, place, label="", **fields):
    """Run code in one server, or with --stream what is asked for; return the exit code."""
    make_output = (functools.partial(JsonOutput, options.max_chars, **fields) if options.json
                   else functools.partial(PlainOutput, label))
    with Execution(server + _credentials(options), label) as session:
        if not options.stream:
            return session.run(make_output(), source, place, options.timeout)
        import json
        for line in filter(bytes.strip, iter(sys.stdin.buffer.readline, b"")):
            try:
                request = json.loads(line.decode())
                if not (isinstance(request, dict) and isinstance(request.get("code"), str)):
                    raise ValueError('expected {"code": TEXT, ...}, found %s' % shorten(request))
                source, timeout_s = request.pop("code").encode(), request.pop("timeout", None)
                session.run(make_output(), source, request, timeout_s or options.timeout)
            except (ValueError, TypeError, LookupError, AttributeError) as exc:
                make_output().finish({"exception": describe_exception(exc)}, 2)
    return 0


def _exec_in_all(options, source, place):
    """Run code in each server of the list that --match fits, one after the other.

    Return 130 after Ctrl+C, which ends all of it; 1 if one failed, or there was none; else 0.
    """
    codes = []
    for note in noted_servers():
        if (options.match or "") in _command(note) and 130 not in codes:
            codes.append(_exec_in(_place_of_note(note), options, source, place,
                                  "%d: " % note["pid"], pid=note["pid"]))
    if not codes:
        say("there is no such server; 'list' shows those there are")
    if 130 in codes:
        code = 130
    else:
        code = 1 if any(codes) or not codes else 0
    if options.json:
        JsonOutput().finish({}, code)
    return code


def _list(options):
    """Print the servers of this user, for people or as JSON."""
    import json
    notes = noted_servers()
    if options.json:
        for note in notes:
            fields = {name: note[name] for name in ("pid", "started", "argv", "address",
                                                    "control_address")}
            print(json.dumps(fields))
    elif notes:
        sys.stdout.buffer.write(_table(notes))
    else:
        say("no server of yours is running here")
    return 0


_SUBCOMMANDS = (        # name, what runs it, usage, purpose, help
    ("serve", _serve, "[options] [SCRIPT ARG ... | -m MODULE ARG ...]",
     "run a script, a module or nothing with a server in it", _SERVE_HELP),
    ("connect", _connect, "[options] [HOST]", "open a session with a running server",
     _CONNECT_HELP),
    ("exec", _exec, "[options] [HOST] (-c CODE | FILE | -)", "run code in a running server",
     _EXEC_HELP),
    ("list", _list, "[options]", "show the running servers of this user", _LIST_HELP))


def _table(notes):
    """Return the list of servers for people, as bytes."""
    rows = [("PID", "ADDRESS", "STARTED", "COMMAND")]
    for note in notes:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note["started"]))
        address = printable(_host_word(note["address"]))
        rows.append((str(note["pid"]), address, started, _command(note)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
             for row in rows]
    return "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")


def _host_word(address):
    """Return an address as the client's HOST."""
    return ("unix:" if isinstance(address, str) else "") + _join_address(address)


def _command(note):
    """Return the command line of a noted server's process, as one line."""
    return printable(" ".join(" ".join(note["argv"]).split()))


def _find_server(options, word):
    """Return (host, port, control port) of the server that `word` names; None: the only one."""
    found = []
    if word is not None and word.isdigit():
        found = [note for note in noted_servers() if note["pid"] == int(word)]
        if not found:
            raise OSError(errno.ESRCH, "process %s has no server; 'list' shows those there are"
                          % word)
    elif word is None and options.port is None:
        found = noted_servers()
    if len(found) > 1:
        found = [_choose(found)]
    if found:
        return _place_of_note(found[0])
    host, port = _split_address(word or DEFAULT_BIND, options.port or DEFAULT_PORT)
    return host, port, options.control_port


def _choose(notes):
    """Return the one of `notes` that the user names; ValueError where nobody can be asked."""
    table, pids = _table(notes).decode(), [note["pid"] for note in notes]
    known = {_host_word(note["address"]): note for note in notes}
    # A process may have several servers, which have addresses of their own.
    known.update((str(note["pid"]), note) for note in notes if pids.count(note["pid"]) == 1)
    if not all(each is not None and each.isatty() for each in (sys.stdin, sys.stderr)):
        raise ValueError("which one? name it by its PID or ADDRESS\n" + table.rstrip())
    sys.stderr.write(table)
    while True:
        sys.stderr.write("which one? PID or ADDRESS: ")
        sys.stderr.flush()
        answer = sys.stdin.readline().strip()
        if not answer:
            raise ValueError("none was named")
        if answer in known:
            return known[answer]
        say("%s names none of them, or several" % shorten(printable(answer)))


def _place_of_note(note):
    """Return (host, port, control port) of a server that is noted."""
    if isinstance(note["address"], str):
        return "unix:" + note["address"], None, None
    host, port = note["address"]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port, None


def _read_source(path):
    """Return the code in the file `path`, - for stdin, as UTF-8, whatever it declares to be in."""
    import importlib.util
    if path == "-":
        data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    else:
        data = _read_file(path, "; exec [HOST] takes -c CODE, a FILE or -")
    try:
        return importlib.util.decode_source(data).encode("utf-8")
    except (SyntaxError, UnicodeError) as exc:
        raise ValueError("can't read %r: %s" % (path, exc)) from exc


def _seconds(text):
    """Return the number of an option in SECONDS, for argparse."""
    with suppress(ValueError):
        if 0 < float(text) <= threading.TIMEOUT_MAX:
            return float(text)
    import argparse
    raise argparse.ArgumentTypeError("expected a number of seconds, found %r" % text)


def _split_address(text, default_port):
    """Return (host, port) of HOST, HOST:PORT, [HOST]:PORT or a bare IPv6 address."""
    match = re.match(r"(?:\[(.*)\]|([^:@]*))(?::(\d+))?$", text)
    if match:
        return match.group(1) or match.group(2) or DEFAULT_BIND, int(match.group(3) or default_port)
    if re.match(r"(?!unix:)[^:@/]+:[^:@/]*$", text):
        raise ValueError("%r has no number as its port, expected HOST:PORT; see --help" % text)
    return text, default_port


def _read_file(path, hint="", limit_bytes=-1):
    """Return the bytes of a file that the user has named; ValueError says why it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(limit_bytes)
    except OSError as exc:
        raise ValueError("can't read %r: %s%s" % (path, exc.strerror, hint)) from exc


def _read_token(path):
    """Return the token in a file, which must hold one and nothing else.

    The path may be a link to a secret of another kind, which is not to be sent.
    """
    data = b""
    if os.path.isfile(path) or not os.path.exists(path):
        data = _read_file(path, limit_bytes=1024)
    try:
        return _checked_token(data.decode("ascii", "replace").strip()).decode()
    except ValueError as exc:
        raise ValueError("%r holds no token: 16 to 512 characters of ASCII without spaces or quotes"
                         % path) from exc


def _say_if_read(text):
    """Say it unless nobody reads just now: the thread that lets people in must not wait for it."""
    with suppress(OSError, ValueError, TypeError):
        # Stderr is closed, or nothing that select() knows.
        if not select.select([], [sys.stderr], [], 0)[1]:
            return
    say(text)


# --- exec: pieces of code are run for a program, which holds a Link and no terminal ---
#
#     Execution.run   connect, if need be   open_channels, until the first prompt
#                     Place, if need be     a request: file and line of what comes next
#                     the code              one block; what is printed goes to the output
#                     input()               is answered by end-of-file
#                     the next prompt       Outcome, a request: value, exception, exit status
#     output          PlainOutput, JsonOutput: write(kind, bytes) as it comes, finish(outcome, code)

class Execution:
    """Runs pieces of code in a session with a server, for a program; each ends with an exit code.

    A context manager. It connects for the first, and again where the session before is over.
    `server` has the arguments of `connect`; what we say ourselves begins with `label`. Ctrl+C and
    the end of the time interrupt the code; the next of them, or GRACE_S later, leaves it running.
    """

    GRACE_S = 2.0                 # how long code may take to end that the time limit interrupted
    LONGEST_S = 1e9               # select() takes not much more
    LATE, PRESSED = 124, 130      # why the code was interrupted: what we exit with

    def __init__(self, server, label=""):
        self._server = server
        self._label = label
        self._link = None         # None: there is no session
        self._undo = ExitStack()  # ends it
        self._output = None       # takes what the code prints that runs
        self._deadline = None     # when the code is to be interrupted, or left
        self._cause = 0           # LATE or PRESSED; 0: it was not interrupted
        self._turn = 0            # how many go-aheads came
        self._stream = "stdout"   # what the data belongs to that comes

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._undo.close()

    def run(self, output, source, place=None, timeout_s=None):
        """Run `source`, bytes, and return the exit code: as of a script, 130 or 124.

        `output` is a PlainOutput or JsonOutput of its own. `place` has the fields of the Place
        command, where the code stands in a module's file.
        """
        self._output, self._deadline, self._cause = output, None, 0
        outcome, code = {}, 1
        timeout_s = timeout_s and min(timeout_s, self.LONGEST_S)
        try:
            self._connect(timeout_s)
            with self._link.signals(SIGINT=self._on_interrupt):
                outcome = self._evaluate(source, place, timeout_s)
            code = self.LATE if self._cause == self.LATE else _exit_code(outcome)
        except Left:
            if self._cause and self._turn:
                say("it has not ended; left it running there")
            code = self._cause or 1
            self._end()
        except ProtocolError as exc:
            # The code can't stand in that place.
            outcome, code = self._say(exc, exc), 2
        except (OSError, ServerGone) as exc:
            # Without a time of ours it is the system's own, after which nobody answers.
            is_late = timeout_s is not None and isinstance(exc, socket.timeout)
            code = self.LATE if is_late else 1
            outcome = self._say("no answer in time" if is_late else "the server is gone: %s" % exc
                                if isinstance(exc, ServerGone) else exc.strerror or exc, exc)
            self._end()
        with suppress(OSError):
            output.finish(outcome, code)
        return code

    def _connect(self, timeout_s):
        """Have a session, within the time; socket.timeout if not."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s + self.GRACE_S
        if self._link is None:
            self._link = entered(self._undo, open_channels(
                *self._server, deadline=deadline, streams=True))
            self._turn, self._stream = 0, "stdout"
        self._link.deadline = deadline

    def _end(self):
        """Let go of the session; the next code begins another."""
        self._link = None
        self._undo.close()

    def _evaluate(self, source, place, timeout_s):
        """Run `source` to its end and return what the server says of that."""
        link = self._link
        if not self._turn and self._until_turn() == "" or link.is_closed:
            _gone("it closed the connection")
        if place:
            link.ask("Place", **place)
        if timeout_s is not None:
            self._deadline = time.monotonic() + timeout_s
            link.deadline = self._deadline + self.GRACE_S
        link.send(BEGIN + BLOCK_KIND + source + END)
        while self._until_turn() in IN_EVALUATION:
            # There is nobody who could answer.
            link.send(END_OF_FILE)
        outcome = _ask_outcome(link)
        if link.is_closed:
            self._end()
            return outcome if "exit" in outcome else _gone("it closed the connection")
        return outcome

    def _until_turn(self):
        """Pass on what comes until the server waits for input; return what for, "": it is gone."""
        word = self._link.until_turn(self._pass_on, self._pause)
        self._turn += 1
        return word

    def _pass_on(self, kind, data):
        """Print what comes, but for the banner and the first prompt."""
        if kind == "stream":
            self._stream = _STREAM_NAMES.get(data, "stdout")
        elif kind == "data" and self._turn:
            try:
                self._output.write(self._stream, data)
            except OSError as exc:
                # Whoever read our output has gone.
                raise Left from exc

    def _pause(self, is_quiet):
        """See to the time limit; return how long the link may wait, None: for ever."""
        # They are for people.
        self._link.notes.clear()
        if self._deadline is None:
            return time_left_s(self._link.deadline, None)
        if time.monotonic() >= self._deadline:
            if self._cause == self.LATE:
                raise Left
            self._cause = self.LATE
            self._deadline = time.monotonic() + self.GRACE_S
            self._interrupt()
        return max(0.0, self._deadline - time.monotonic())

    def _on_interrupt(self, signum, frame):
        """SIGINT's handler: the first Ctrl+C interrupts the code, the next leaves."""
        is_first, self._cause = not self._cause, self._cause or self.PRESSED
        if not is_first or not self._turn:
            raise Left
        self._interrupt()

    def _interrupt(self):
        """Have the code interrupted that runs now, and none later."""
        self._link.post("KeyboardInterrupt", turn=self._turn, answered=True)

    def _say(self, text, exc):
        """Say what went wrong; return it as an outcome."""
        say("%s%s" % (self._label, text))
        return {"exception": describe_exception(exc)}


_STREAM_NAMES = {mark: name for name, mark in STREAM_KINDS.items()}


def describe_exception(exc):
    """Return an exception of our own as Outcome describes one."""
    return {"type": type(exc).__name__, "message": str(exc), "traceback": ""}


def _ask_outcome(link):
    """Return what the server says of the last input, checked; ServerGone: it makes no sense."""
    try:
        outcome = link.ask("Outcome").get("outcome")
        is_sound = type(outcome.get("exit", 0)) is int and isinstance(outcome.get("value", ""), str)
        if "exception" in outcome:
            known = {name: outcome["exception"][name] for name in ("type", "message", "traceback")}
            is_sound = is_sound and all(isinstance(text, str) for text in known.values())
            outcome = dict(outcome, exception=known)
    except ProtocolError as exc:
        raise ServerGone(str(exc)) from exc
    except (AttributeError, LookupError, TypeError):
        is_sound = False
    return outcome if is_sound else _gone("its reply to Outcome makes no sense")


def _exit_code(outcome):
    """Return what we exit with after such an outcome."""
    if "exit" in outcome:
        # What is no C int is 255, as sys.exit() has it.
        return outcome["exit"] if -1 << 31 <= outcome["exit"] < 1 << 31 else 255
    kind = outcome.get("exception", {"type": None})["type"]
    return {None: 0, "KeyboardInterrupt": 130}.get(kind, 1)


class PlainOutput:
    """Prints what comes: to stdout and stderr as the code did, byte for byte.

    With a `prefix`, only whole lines, each behind the prefix.
    """

    def __init__(self, prefix=""):
        self._prefix = prefix.encode()
        # Lines whose end has not come yet.
        self._begun = {"stdout": bytearray(), "stderr": bytearray()}

    def write(self, kind, data):
        """Print `data`, bytes of that kind (as in STREAM_KINDS). OSError: nobody reads it."""
        name = {"value": "stdout", "traceback": "stderr", "prompt": None}.get(kind, kind)
        if name and self._prefix:
            head, newline, rest = data.rpartition(b"\n")
            lines = (self._begun[name] + head).split(b"\n") if newline else []
            if newline:
                self._begun[name].clear()
            self._begun[name] += rest
            data = b"".join(self._prefix + line + b"\n" for line in lines)
        if name:
            _write_out(name, data)

    def finish(self, outcome, code):
        """Tell how it ended, where that was not printed already."""
        for name, rest in self._begun.items():
            if rest:
                _write_out(name, self._prefix + rest + b"\n")


class JsonOutput:
    """Prints what comes as JSON objects, one a line; `fields` are in each.

    A text of over `max_chars` is cut; so is all that one piece of code prints to a stream.
    """

    def __init__(self, max_chars=None, **fields):
        import codecs
        # Characters may come in pieces.
        decoder = codecs.getincrementaldecoder("utf-8")
        self._max_chars = sys.maxsize if max_chars is None else max_chars
        self._fields = fields
        self._printed = {"stdout": decoder(), "stderr": decoder()}
        # Characters that may still be printed; below 0: a text was cut.
        self._left = dict.fromkeys(self._printed, self._max_chars)
        # What is printed at the end, as a whole.
        self._whole = {"value": bytearray(), "traceback": bytearray()}

    def write(self, kind, data):
        """Print `data`, bytes of that kind. OSError: nobody reads it."""
        if kind in self._whole:
            self._whole[kind] += data
        elif kind in self._printed:
            self._put_chunk(kind, data)

    def finish(self, outcome, code):
        """Print the value or the exception, and the exit code."""
        for name in self._printed:
            self._put_chunk(name, b"", is_last=True)
        texts = {kind: data.decode("utf-8", "replace") for kind, data in self._whole.items()}
        if "value" in outcome:
            # In full where it was displayed; else it may have been cut.
            value = texts["value"][:-1] or outcome["value"]
            self._put(len(value) > self._max_chars, value=value[:self._max_chars])
        if "exception" in outcome:
            whole = dict(outcome["exception"])
            whole["traceback"] = texts["traceback"] or whole["traceback"]
            cut = {name: text[:self._max_chars] for name, text in whole.items()}
            self._put(cut != whole, exception=cut)
        self._put(exit=code)

    def _put_chunk(self, name, data, is_last=False):
        """Print what has come of a stream: as text, as far as it ends with a whole character.

        In base64 what is no UTF-8; nothing once a text of the stream was cut.
        """
        decoder, left = self._printed[name], self._left[name]
        begun = decoder.getstate()[0]
        try:
            text = decoder.decode(data, is_last)
        except UnicodeDecodeError:
            import base64
            decoder.reset()
            return self._put(stream=name, base64=base64.b64encode(begun + data).decode("ascii"))
        if text and left >= 0:
            self._left[name] -= len(text)
            self._put(len(text) > left, stream=name, text=text[:left])

    def _put(self, is_cut=False, **fields):
        """Print one object."""
        import json
        if is_cut:
            fields["truncated"] = True
        _write_out("stdout", (json.dumps(dict(self._fields, **fields)) + "\n").encode("ascii"))


def _write_out(name, data):
    """Write bytes to our stdout or stderr at once; BrokenPipeError: nobody reads them."""
    stream = getattr(getattr(sys, name), "buffer", None)
    if stream is None:
        # It was closed before we began.
        return
    try:
        while data:
            # With python -u a signal can cut a write short.
            data = data[stream.write(data):]
        stream.flush()
    except BrokenPipeError:
        # Python flushes stdout at its exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


if __name__ == "__main__":
    sys.exit(main())


# MIT License
#
# Copyright (c) 2026 the hotrepl authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy
# of this software and associated documentation files (the "Software"), to deal
# in the Software without restriction, including without limitation the rights
# to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
# copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all
# copies or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
# IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
# FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
# AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
# LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
# OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
# SOFTWARE.
