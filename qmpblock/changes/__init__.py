"""What must survive `kill -9`: recorded before, undone or carried on after, by whomever."""
