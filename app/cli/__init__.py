"""The command line, `packforcing`: each command checks its request and calls the library."""

TYPE_CHECKING = False  # without `typing`: an interrupt is answered from the first call on

if TYPE_CHECKING:
    from packforcing.app.cli.group import main
else:

    class _Program:
        """The group of commands, loaded when it is called, so that Ctrl-C is answered meanwhile."""

        name = "packforcing"

        def __call__(self, *args, **extra):
            try:
                self.main(*args, **extra)
            except KeyboardInterrupt:  # before the signals had their handlers
                raise SystemExit(130) from None
            finally:
                import signal

                signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done but the exit

        def main(self, *args, **extra):
            from packforcing.app.cli.process import guard

            with guard():
                from packforcing.app.cli.group import main

                main.main(*args, **extra)

        def __getattr__(self, name):
            from packforcing.app.cli.group import main

            return getattr(main, name)

    main = _Program()

__all__ = ["main"]
